"""Seconds to draw the pictures of a card and to write it, from the reports in model_cards/.

python benchmarks/card.py

Seconds are those of the processor. The weights that are drawn before and after are MiniLM's, and the
same with 80 % of them zero.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

from transformers import AutoModel

from hf_compress.measure import environment
from hf_compress.publishing.card import render
from hf_compress.publishing.pictures import draw_all
from hf_compress.publishing.validate import find_problems
from hf_compress.samples import minilm
from hf_compress.targets import find_targets

CARDS = Path(__file__).parents[1] / "model_cards"


def main():
    argparse.ArgumentParser(description=__doc__).parse_args()
    before, after = [], []
    for weight in find_targets(AutoModel.from_pretrained(minilm())).parameters.values():
        before.append(weight.detach().clone())
        weight.data[weight.abs() < weight.abs().quantile(0.8)] = 0
        after.append(weight.detach())
    rows = {}
    for path in sorted(CARDS.glob("*/report.json")):
        report = json.loads(path.read_text())
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder)
            (place / "report.json").write_text(json.dumps(report))
            begin = time.process_time()
            pictures = draw_all(report, before, after, place)
            drawn = time.process_time()
            (place / "README.md").write_text(render(report, pictures=pictures))
            written = time.process_time()
            problems = find_problems(place)
            checked = time.process_time()
        rows[path.parent.name] = {
            "pictures": len(pictures),
            "draw_seconds": drawn - begin,
            "write_seconds": written - drawn,
            "check_seconds": checked - written,
            "problems": len(problems),
            "seconds": checked - begin,
        }
    print(
        json.dumps(
            {"weights": sum(w.numel() for w in before), "cards": rows, "environment": environment()}
        )
    )


if __name__ == "__main__":
    main()
