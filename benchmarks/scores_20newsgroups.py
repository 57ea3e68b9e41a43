"""Every score, pattern and allocation on 20 Newsgroups, MiniLM distilled from its dense self while it
is pruned, against torch.nn.utils.prune: one-shot magnitude, global or by layer, then the same training.

    python benchmarks/scores_20newsgroups.py --methods obd one-shot 2:4 --sparsity 0.9 0.95

Each run is kept in the cache as soon as it is done, so that a sweep which was stopped goes on where it
was. Prints JSON; `zeros` are those counted in the targeted weights of the trained model. Allocations
rank by OBD within each weight; "sensitivity" has scanned 256 training rows.
"""

import argparse
import json
import tempfile

import minilm
import torch
from torch.nn.utils import prune
from tqdm import tqdm
from transformers import DataCollatorWithPadding, set_seed

from hf_compress import PruningCallback, scan_sensitivity
from hf_compress.callbacks.rigl import RigLCallback
from hf_compress.pruning.allocate import by_sensitivity, erk, uniform
from hf_compress.targets import find_targets

CORPUS = "20newsgroups"
SCORES = ("obd", "taylor", "magnitude", "wanda", "random")
PATTERNS = ("4x1", "1x4", "2:4")
ALLOCATIONS = ("uniform", "erk", "sensitivity")
ONE_SHOT = ("one-shot", "one-shot-by-layer")
METHODS = (*SCORES, *PATTERNS, *ALLOCATIONS, "rigl", "alternating", *ONE_SHOT)


def alternating(progress):
    """Dense and sparse in turn, as in AC/DC (papers/2106.12379)."""
    return 1.0 if progress == 1.0 else float(int(8 * progress) % 2)


def callback(method, sparsity, scope):
    if method == "rigl":
        return RigLCallback(sparsity, interval=10)
    if method == "alternating":
        return PruningCallback(sparsity, schedule=alternating)
    if method == "2:4":
        return PruningCallback(pattern=method)
    if method in PATTERNS:
        return PruningCallback(sparsity, pattern=method)
    if method in ALLOCATIONS:
        return PruningCallback(sparsity)
    scope = scope or ("row" if method == "wanda" else "global")
    return PruningCallback(sparsity, score=method, scope=scope)


def scanned(folder, data, options):
    """How much worse the loss gets, by weight and its sparsity; ranked by OBD, as in the training."""
    tokenizer, train, _, names = data
    model, collate = minilm.classifier(folder, names).eval(), DataCollatorWithPadding(tokenizer)
    batches = [collate([train[i] for i in range(at, at + 32)]) for at in range(0, 256, 32)]

    def loss(batch):
        with torch.autocast("cpu", torch.bfloat16, enabled=options.bf16):
            return model(**batch).loss

    weights = find_targets(model).parameters
    fisher = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for batch in batches:
        gradients = torch.autograd.grad(loss(batch), list(weights.values()))
        for name, gradient in zip(weights, gradients, strict=True):
            fisher[name] += gradient.square()
    scan = scan_sensitivity(
        model,
        lambda _: sum(loss(batch).item() for batch in batches),
        greater_is_better=False,
        scores={name: weight.detach().square() * fisher[name] for name, weight in weights.items()},
    )
    return {name: list(curve.items()) for name, curve in scan.harm().items()}


def allocation(method, sparsity, folder, data, options, runs):
    """A sparsity for each weight."""
    weights = find_targets(minilm.classifier(folder, data[-1])).parameters
    if method == "sensitivity":
        found = minilm.cached(runs / "scan.json", lambda: scanned(folder, data, options))
        return by_sensitivity(weights, sparsity, {name: dict(curve) for name, curve in found.items()})
    return (erk if method == "erk" else uniform)(weights, sparsity)


def modules_and_names(model):
    """As torch.nn.utils.prune takes the weights that the callback prunes."""
    return [(model.get_submodule(t.owner), "weight") for t in find_targets(model).targets.values()]


def zeros(model):
    weights = find_targets(model).parameters.values()
    return sum((w == 0).sum().item() for w in weights) / sum(w.numel() for w in weights)


def run(method, sparsity, seed, folder, data, options, runs):
    """Test accuracy and zeros after one training."""
    tokenizer, train, test, names = data
    if method in ALLOCATIONS:
        sparsity = allocation(method, sparsity, folder, data, options, runs)
    set_seed(seed)
    student = minilm.classifier(folder, names)
    pruned = modules_and_names(student) if method in ONE_SHOT else []
    if method == "one-shot":
        prune.global_unstructured(pruned, prune.L1Unstructured, amount=sparsity)
    if method == "one-shot-by-layer":
        for module, name in pruned:
            prune.l1_unstructured(module, name, amount=sparsity)
    with tempfile.TemporaryDirectory() as output:
        trainer = minilm.trainer(
            student,
            output,
            tokenizer,
            train,
            test,
            callbacks=[] if pruned else [callback(method, sparsity, options.scope)],
            seed=seed,
            teacher=str(folder),
            num_train_epochs=options.epochs,
            learning_rate=options.learning_rate,
            bf16=options.bf16,
        )
        trainer.train()
        for module, name in pruned:
            prune.remove(module, name)
        return {"accuracy": trainer.evaluate()["eval_accuracy"], "zeros": zeros(student)}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.8, 0.9, 0.95, 0.97])
    parser.add_argument(
        "--scope", help="of the ranking by a score; by default row for wanda, else global"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    minilm.add_dense_arguments(parser)
    options = parser.parse_args()
    data, folder = minilm.dense_of(CORPUS, options)
    _, train, test, _ = data
    runs = folder.with_name(f"{folder.name}-pruned-{options.epochs:g}-epochs-{options.learning_rate}")
    by = f"-by-{options.scope}" if options.scope else ""

    asked = [
        (method, 0.5 if method == "2:4" else sparsity, seed)
        for seed in options.seeds
        for sparsity in options.sparsity
        for method in options.methods
    ]
    result = {**vars(options), "rows": len(train), "test_rows": len(test)}
    result["dense"] = minilm.cached(runs / "dense.json", lambda: minilm.accuracy_of(folder, *data))
    result["pruned"] = []
    for method, sparsity, seed in tqdm(list(dict.fromkeys(asked)), desc="trainings", unit="run"):
        found = minilm.cached(
            runs / f"{method.replace(':', '-of-')}{by}-{sparsity}-{seed}.json",
            lambda method=method, sparsity=sparsity, seed=seed: run(
                method, sparsity, seed, folder, data, options, runs
            ),
        )
        result["pruned"].append({"method": method, "sparsity": sparsity, "seed": seed, **found})
    print(json.dumps(result))


if __name__ == "__main__":
    main()
