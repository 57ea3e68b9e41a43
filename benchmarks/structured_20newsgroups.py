"""MiniLM fine-tuned on 20 Newsgroups loses half its layers and half its feed-forward neurons, and
recovers by distillation from the dense one. Accuracy, and latency in turn with the dense model.

    python benchmarks/structured_20newsgroups.py

The small model is saved, and everything is measured on what plain transformers load of it. Each
recovered model and its accuracy are kept in the cache as soon as they are done, so that a run which
was stopped goes on where it was. Prints JSON.
"""

import argparse
import hashlib
import json
import time

import minilm
import torch
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    set_seed,
)

from hf_compress.latency import compare_latency
from hf_compress.measure import bytes_on_disk, environment
from hf_compress.pruning.structure.removal import prune_structure

CORPUS = "20newsgroups"
OF_PRUNING = ("ffn", "layers", "score", "calibration_rows")
OF_RECOVERY = ("epochs", "learning_rate", "alpha", "temperature", "bf16")


def evaluated(folder, data):
    """Accuracy and size of what is in `folder`."""
    tokenizer, train, test, _ = data
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    trainer = minilm.trainer(model, minilm.CACHE / "tmp", tokenizer, train, test)
    return {
        "accuracy": trainer.evaluate()["eval_accuracy"],
        "parameters": model.num_parameters(),
        "bytes": bytes_on_disk(folder),
    }


def run(seed, dense_folder, folder, data, options):
    """Prunes, recovers and saves a model; what it took, and what it is like when loaded again."""
    tokenizer, train, test, _ = data
    collate = DataCollatorWithPadding(tokenizer)
    rows = train.shuffle(seed=0).select(range(min(options.calibration_rows, len(train))))
    calibration = [
        collate([rows[i] for i in range(at, min(at + 32, len(rows)))]) for at in range(0, len(rows), 32)
    ]
    set_seed(seed)
    dense = AutoModelForSequenceClassification.from_pretrained(dense_folder)
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
    trainer = minilm.trainer(
        smaller,
        minilm.CACHE / "tmp",
        tokenizer,
        train,
        test,
        seed=seed,
        teacher=dense,
        alpha=options.alpha,
        temperature=options.temperature,
        num_train_epochs=options.epochs,
        learning_rate=options.learning_rate,
        bf16=options.bf16,
    )
    before = trainer.evaluate()["eval_accuracy"]
    trainer.train()
    smaller.save_pretrained(folder)
    return {
        "seconds_to_prune": seconds,
        "accuracy_before_recovery": before,
        **evaluated(folder, data),
    }


def latencies(folders, options):
    """By batch size the median milliseconds of each model, and how many times faster the small is."""
    models = {
        name: AutoModelForSequenceClassification.from_pretrained(folder)
        for name, folder in folders.items()
    }
    found = {}
    for size in (1, 16):
        ids = torch.randint(1000, 30000, (size, options.length), generator=torch.manual_seed(0))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        times = compare_latency(models, inputs, runs=options.runs)
        found[f"batch {size}"] = {
            **{name: vars(latency) for name, latency in times.items()},
            "ratio": times["dense"].median_ms / times["smaller"].median_ms,
        }
    return found


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--ffn", type=float, default=0.5)
    parser.add_argument("--layers", type=int, nargs="+", default=[3], help="how many, or their numbers")
    parser.add_argument("--score", default="taylor")
    parser.add_argument("--calibration_rows", type=int, default=256)
    parser.add_argument("--epochs", type=float, default=5)
    parser.add_argument("--learning_rate", type=float, default=3e-4)
    parser.add_argument("--alpha", type=float, default=0.5)
    parser.add_argument("--temperature", type=float, default=2.0)
    parser.add_argument("--runs", type=int, default=50, help="forward passes for each latency")
    minilm.add_dense_arguments(parser, length=128, epochs=4, learning_rate=1e-4)
    options = parser.parse_args()
    data, dense = minilm.dense_of(CORPUS, options)
    settings = json.dumps({name: vars(options)[name] for name in (*OF_PRUNING, *OF_RECOVERY)})
    digest = hashlib.sha256(settings.encode()).hexdigest()[:12]
    runs = dense.with_name(f"{dense.name}-structured-{digest}")
    result = {**vars(options), "pruned": [], "environment": environment()}
    result["dense"] = minilm.cached(runs / "dense.json", lambda: evaluated(dense, data))
    for seed in options.seeds:
        folder = runs / f"seed-{seed}"
        found = minilm.cached(
            runs / f"seed-{seed}.json",
            lambda seed=seed, folder=folder: run(seed, dense, folder, data, options),
        )
        result["pruned"].append({"seed": seed, **found})
    result["latency"] = latencies({"dense": dense, "smaller": folder}, options)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
