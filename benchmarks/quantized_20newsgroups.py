"""MiniLM fine-tuned on 20 Newsgroups, in integers: rounded to nearest, and trained on the grid with its
dense self as the teacher. Test accuracy with weights, or weights and inputs, as integers.

    python benchmarks/quantized_20newsgroups.py --methods rtn-w4 w4 w8a8

Methods: wB has weights of B bits; a8 has inputs of 8 bits too, a grid for each token; rtn- is not
trained. Weights are in groups, 8-bit ones by output channel. Each run is kept in the cache as soon as
it is done, so that a sweep which was stopped goes on where it was. Prints JSON.
"""

import argparse
import json
import tempfile

import minilm
from tqdm import tqdm
from transformers import set_seed

from hf_compress import QuantizationCallback, quantize_oneshot_

CORPUS = "20newsgroups"
METHODS = ("rtn-w8", "rtn-w4", "rtn-w3", "rtn-w2", "w8a8", "w4", "w4a8", "w3", "w2")


def run(method, seed, folder, data, options):
    tokenizer, train, test, names = data
    set_seed(seed)
    model = minilm.classifier(folder, names)
    bits = int(method.removeprefix("rtn-")[1])
    scheme = {
        "bits": bits,
        "group_size": None if bits == 8 else options.group_size,
        "grid": options.grid,
    }
    trained = not method.startswith("rtn-")
    if not trained:
        quantize_oneshot_(model, method="rtn", **scheme)
    activations = 8 if method.endswith("a8") else None
    with tempfile.TemporaryDirectory() as output:
        trainer = minilm.trainer(
            model,
            output,
            tokenizer,
            train,
            test,
            callbacks=[QuantizationCallback(**scheme, activations=activations)] if trained else [],
            seed=seed,
            teacher=str(folder),
            num_train_epochs=options.epochs,
            learning_rate=options.learning_rate,
            bf16=options.bf16,
        )
        if trained:
            trainer.train()
        return {"accuracy": trainer.evaluate()["eval_accuracy"]}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--grid", default="mse")
    parser.add_argument("--group_size", type=int, default=32)
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    minilm.add_dense_arguments(parser)
    options = parser.parse_args()
    data, folder = minilm.dense_of(CORPUS, options)
    settings = (options.epochs, options.learning_rate, options.grid, options.group_size)
    runs = folder.with_name("-".join([folder.name, "quantized", *map(str, settings)]))

    result = {**vars(options), "rows": len(data[1]), "test_rows": len(data[2])}
    result["dense"] = minilm.cached(runs / "dense.json", lambda: minilm.accuracy_of(folder, *data))
    result["quantized"] = []
    asked = [(method, seed) for seed in options.seeds for method in options.methods]
    for method, seed in tqdm(asked, desc="trainings", unit="run"):
        found = minilm.cached(
            runs / f"{method}-{seed}.json",
            lambda method=method, seed=seed: run(method, seed, folder, data, options),
        )
        result["quantized"].append({"method": method, "seed": seed, **found})
    print(json.dumps(result))


if __name__ == "__main__":
    main()
