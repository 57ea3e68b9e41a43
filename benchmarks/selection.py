"""Exact global threshold over many weights, against concatenate + kthvalue in the same run.

    python benchmarks/selection.py --millions 20 100

Time per weight must not grow, and the extra memory (beyond the masks that are the result, and beyond
`fixed_megabytes`, which the libraries and a first selection of a million weights take) must stay below
5 % of the weights. Prints JSON.
"""

import argparse
import json
import subprocess
import sys
import time

import torch
from memory import peak_bytes

from hf_compress.pruning.scores import magnitude
from hf_compress.pruning.select import keep_highest

LAYER = 5_000_000


def measure(millions, method):
    weights = [torch.randn(LAYER) for _ in range(millions * 1_000_000 // LAYER)]
    first = peak_bytes()
    keep_highest(magnitude, [(torch.randn(1_000_000),)], 500_000)
    torch.randn(1_000_000).kthvalue(500_000)
    before, start = peak_bytes(), time.perf_counter()
    kept = millions * 1_000_000 // 10
    if method == "hf_compress":
        masks = keep_highest(magnitude, [(weight,) for weight in weights], kept)
        count = sum(int(torch.count_nonzero(mask)) for mask in masks)
    else:
        scores = torch.cat([weight.abs() for weight in weights])
        threshold = scores.kthvalue(len(scores) - kept).values
        del scores
        count = sum(int(torch.count_nonzero(weight.abs() > threshold)) for weight in weights)
    seconds = time.perf_counter() - start
    masks_bytes = millions * 1_000_000 if method == "hf_compress" else 0
    return {
        "millions": millions,
        "method": method,
        "seconds": round(seconds, 3),
        "ns_per_weight": round(seconds * 1000 / millions, 2),
        "extra_memory_of_weights": round(
            max(peak_bytes() - before - masks_bytes, 0) / (4_000_000 * millions), 3
        ),
        "fixed_megabytes": round((before - first) / 1e6, 1),
        "exact": count == kept,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--millions", type=int, nargs="+", default=[20, 100, 400])
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.millions[0], options.one)))
        return
    rows = []
    for millions in options.millions:
        # A process of its own for each, since the peak of a process never falls.
        pair = [
            json.loads(
                subprocess.run(
                    [sys.executable, __file__, "--millions", str(millions), "--one", method],
                    capture_output=True,
                    check=True,
                    text=True,
                ).stdout
            )
            for method in ("hf_compress", "kthvalue")
        ]
        pair[0]["time_ratio_to_kthvalue"] = round(pair[0]["seconds"] / pair[1]["seconds"], 3)
        rows += pair
    print(json.dumps({"threads": torch.get_num_threads(), "torch": torch.__version__, "rows": rows}))


if __name__ == "__main__":
    main()
