"""Bytes and seconds of packed weights beside dense ones: MiniLM, pruned by magnitude.

python benchmarks/packed.py --sparsity 0.5 0.9
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModel

from hf_compress.measure import environment
from hf_compress.publishing.packed import load_packed, save_packed
from hf_compress.samples import minilm
from hf_compress.targets import find_targets


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.9])
    options = parser.parse_args()
    rows = []
    for sparsity in options.sparsity:
        for dtype in (torch.float32, torch.bfloat16):
            model = AutoModel.from_pretrained(minilm(), dtype=dtype)
            for weight in find_targets(model).parameters.values():
                weight.data[weight.abs() < weight.abs().float().quantile(sparsity)] = 0
            with tempfile.TemporaryDirectory() as folder:
                dense, packed = Path(folder) / "dense", Path(folder) / "packed"
                model.save_pretrained(dense)
                seconds = [time.perf_counter()]
                sizes = save_packed(dense, packed)
                seconds.append(time.perf_counter())
                load_packed(packed, AutoModel)
                seconds.append(time.perf_counter())
                AutoModel.from_pretrained(dense)
                seconds.append(time.perf_counter())
            saving, loading, plain = (b - a for a, b in zip(seconds, seconds[1:], strict=False))
            rows.append(
                {
                    "sparsity": sparsity,
                    "dtype": str(dtype).removeprefix("torch."),
                    "dense_bytes": sizes.dense,
                    "packed_bytes": sizes.packed,
                    "ratio": sizes.packed / sizes.dense,
                    "save_seconds": saving,
                    "load_seconds": loading,
                    "load_dense_seconds": plain,
                }
            )
    print(json.dumps({"rows": rows, "environment": environment()}))


if __name__ == "__main__":
    main()
