"""MiniLM with the tokens of one corpus: bytes before and after, and what other texts then cost.

python benchmarks/vocabulary.py --dataset reuters-r8
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

from transformers import AutoModel, AutoTokenizer

from hf_compress.measure import bytes_on_disk, environment
from hf_compress.pruning.vocabulary.prune import prune_vocabulary
from hf_compress.samples import corpus, minilm


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", default="reuters-r8", help="its train split is kept")
    options = parser.parse_args()
    data = corpus(options.dataset)
    dense, tokenizer = AutoModel.from_pretrained(minilm()), AutoTokenizer.from_pretrained(minilm())
    begin = time.perf_counter()
    model, smaller = prune_vocabulary(dense, tokenizer, data["train"]["text"])
    result = {
        **vars(options),
        "seconds": time.perf_counter() - begin,
        "tokens": [len(tokenizer), len(smaller)],
        "parameters": [dense.num_parameters(), model.num_parameters()],
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, saved in (("dense", (dense, tokenizer)), ("pruned", (model, smaller))):
            for each in saved:
                each.save_pretrained(Path(folder) / name)
        folders = [Path(folder) / name for name in ("dense", "pruned")]
        result["weight_bytes"] = [bytes_on_disk(each) for each in folders]
        result["tokenizer_bytes"] = [(each / "tokenizer.json").stat().st_size for each in folders]
    for split in data:
        pairs = [(tokenizer.tokenize(text), smaller.tokenize(text)) for text in data[split]["text"]]
        result[split] = {
            "same_tokens": sum(before == after for before, after in pairs) / len(pairs),
            "longer": sum(len(after) for _, after in pairs) / sum(len(before) for before, _ in pairs),
        }
    print(json.dumps({**result, "environment": environment()}))


if __name__ == "__main__":
    main()
