"""MiniLM fine-tuned on 20 Newsgroups loses half its layers and half its feed-forward neurons, and
recovers by distillation from the dense one. Accuracy, and latency in turn with the dense model.

python benchmarks/structured_20newsgroups.py
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import minilm
import torch
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    set_seed,
)

from hf_compress.measure import bytes_on_disk, compare_latency, environment
from hf_compress.pruning.structure.removal import prune_structure

CORPUS = "20newsgroups"


def accuracy(model, output, tokenizer, train, test):
    return minilm.trainer(model, output, tokenizer, train, test).evaluate()["eval_accuracy"]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--ffn", type=float, default=0.5)
    parser.add_argument("--layers", type=int, nargs="+", default=[3], help="how many, or their numbers")
    parser.add_argument("--score", default="taylor")
    parser.add_argument("--calibration_rows", type=int, default=256)
    parser.add_argument("--epochs", type=float, default=5)
    parser.add_argument("--learning_rate", type=float, default=3e-4)
    parser.add_argument("--alpha", type=float, default=0.5)
    parser.add_argument("--temperature", type=float, default=2.0)
    parser.add_argument("--length", type=int, default=128, help="tokens for each row")
    parser.add_argument("--dense_epochs", type=int, default=4)
    parser.add_argument("--runs", type=int, default=50, help="forward passes for each latency")
    parser.add_argument("--rows", type=int, help="of each split; all by default")
    options = parser.parse_args()
    tokenizer, train, test, names = minilm.load(CORPUS, options.length, options.rows)
    folder = minilm.dense(
        CORPUS, tokenizer, train, test, names, length=options.length, epochs=options.dense_epochs
    )
    collate = DataCollatorWithPadding(tokenizer)
    rows = train.shuffle(seed=0).select(range(min(options.calibration_rows, len(train))))
    calibration = [
        collate([rows[i] for i in range(at, min(at + 32, len(rows)))]) for at in range(0, len(rows), 32)
    ]
    result = {**vars(options), "pruned": [], "environment": environment()}
    with tempfile.TemporaryDirectory() as output:
        dense = AutoModelForSequenceClassification.from_pretrained(folder)
        result["dense"] = {
            "accuracy": accuracy(dense, output, tokenizer, train, test),
            "parameters": dense.num_parameters(),
            "bytes": bytes_on_disk(folder),
        }
        for seed in options.seeds:
            set_seed(seed)
            begin = time.perf_counter()
            smaller = prune_structure(
                dense,
                ffn=options.ffn,
                layers=options.layers[0] if len(options.layers) == 1 else options.layers,
                score=options.score,
                calibration=calibration,
                seed=seed,
            )
            seconds = time.perf_counter() - begin
            before = accuracy(smaller, output, tokenizer, train, test)
            minilm.trainer(
                smaller,
                output,
                tokenizer,
                train,
                test,
                seed=seed,
                teacher=dense,
                alpha=options.alpha,
                temperature=options.temperature,
                num_train_epochs=options.epochs,
                learning_rate=options.learning_rate,
                train_sampling_strategy="group_by_length",
            ).train()
            smaller.save_pretrained(output)
            loaded = AutoModelForSequenceClassification.from_pretrained(output)
            result["pruned"].append(
                {
                    "seed": seed,
                    "seconds_to_prune": seconds,
                    "accuracy_before_recovery": before,
                    "accuracy": accuracy(loaded, output, tokenizer, train, test),
                    "parameters": loaded.num_parameters(),
                    "bytes": bytes_on_disk(Path(output)),
                }
            )
    result["latency"] = {}
    for size in (1, 16):
        ids = torch.randint(1000, 30000, (size, options.length), generator=torch.manual_seed(0))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        times = compare_latency({"dense": dense, "smaller": loaded}, inputs, runs=options.runs)
        result["latency"][f"batch {size}"] = {
            **{name: vars(latency) for name, latency in times.items()},
            "speedup": times["dense"].median_ms / times["smaller"].median_ms,
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
