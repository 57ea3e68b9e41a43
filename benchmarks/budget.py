"""MiniLM fine-tuned on 20 Newsgroups, made so many times faster, or so small: asked and measured.

    python benchmarks/budget.py --speedup 1.5 2 3 --megabytes 70

What is measured is what plain `from_pretrained` loads of the written folder, anew and with more passes
than the search took; accuracy is that of the test split before any recovery. Prints JSON.
"""

import argparse
import json
import tempfile
import time

import minilm
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding

from hf_compress import fit_structure
from hf_compress.latency import compare_latency
from hf_compress.measure import bytes_on_disk, environment


def fitted(dense, calibration, data, options, **budget):
    begin = time.perf_counter()
    found = fit_structure(dense, calibration, runs=options.runs, inputs=calibration[0], **budget)
    seconds = time.perf_counter() - begin
    tokenizer, train, test, _ = data
    with tempfile.TemporaryDirectory() as folder:
        found.model.save_pretrained(folder)
        loaded = AutoModelForSequenceClassification.from_pretrained(folder)
        size = bytes_on_disk(folder)
    times = compare_latency({"dense": dense, "smaller": loaded}, calibration[0], runs=3 * options.runs)
    evaluated = minilm.trainer(loaded, minilm.CACHE / "tmp", tokenizer, train, test).evaluate()
    return {
        "asked": budget,
        "settings": found.settings,
        "seconds": round(seconds, 1),
        "speedup_in_the_search": found.speedup,
        "speedup": times["dense"].median_ms / times["smaller"].median_ms,
        "bytes_of_weights": found.bytes,
        "bytes_of_file": size,
        "losses": found.losses,
        "accuracy_before_recovery": evaluated["eval_accuracy"],
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--speedup", type=float, nargs="*", default=[1.5, 2.0, 3.0])
    parser.add_argument("--megabytes", type=int, nargs="*", default=[70])
    parser.add_argument("--calibration_rows", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16, help="rows of one timed pass")
    parser.add_argument("--runs", type=int, default=20, help="forward passes for each latency")
    minilm.add_dense_arguments(parser)
    options = parser.parse_args()
    data, folder = minilm.dense_of("20newsgroups", options)
    tokenizer, train, _, _ = data
    collate, count = DataCollatorWithPadding(tokenizer), options.batch
    calibration = [
        collate([train[i] for i in range(at, at + count)])
        for at in range(0, options.calibration_rows, count)
    ]
    dense = AutoModelForSequenceClassification.from_pretrained(folder)
    budgets = [{"speedup": value} for value in options.speedup]
    budgets += [{"max_bytes": value * 1_000_000} for value in options.megabytes]
    found = [fitted(dense, calibration, data, options, **budget) for budget in budgets]
    print(json.dumps({**vars(options), "found": found, "environment": environment()}))


if __name__ == "__main__":
    main()
