"""The work of one process in an environment that has TextPruner: prunes the vocabulary of a model.

    python text_pruner_peer.py --model FOLDER --texts FILE --output FOLDER

The file is JSON, a list of texts. TextPruner's tokens are those that they use.
"""

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path

from textpruner import GeneralConfig, VocabularyPruner
from transformers import AutoModel, AutoTokenizer


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--texts", required=True)
    parser.add_argument("--output", required=True)
    options = parser.parse_args()
    texts = json.loads(Path(options.texts).read_text())
    pruner = VocabularyPruner(
        AutoModel.from_pretrained(options.model),
        AutoTokenizer.from_pretrained(options.model),
        general_config=GeneralConfig(use_device="cpu", output_dir=options.output),
    )
    begin = time.perf_counter()
    folder = pruner.prune(dataiter=texts)
    seconds = time.perf_counter() - begin
    tool = f"textpruner {version('textpruner')}, transformers {version('transformers')}"
    print(json.dumps({"tool": tool, "seconds": seconds, "folder": folder}))


if __name__ == "__main__":
    main()
