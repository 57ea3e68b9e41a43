"""Students of MiniLM with 2 and 3 of its 6 layers on 20 Newsgroups: from the labels alone, from the
teacher's logits, and by each preset from inside the teacher too.

    python benchmarks/students_20newsgroups.py --methods ce kd minilmv2 --layers 2 --seeds 0 1 2

Every method starts from the same layers of the teacher and its head. Each run is kept in the cache as
soon as it is done, so that a sweep which was stopped goes on where it was. Prints JSON: `spread` is
the best minus the worst accuracy of the seeds, `of_dense` the mean's share of the teacher's accuracy.
"""

import argparse
import json
import tempfile

import minilm
from tqdm import tqdm
from transformers import set_seed

from hf_compress import init_student
from hf_compress.distillation.features.presets import PRESETS

CORPUS = "20newsgroups"
METHODS = ("ce", "kd", *PRESETS)
FOR_STUDENTS = tuple(name for name in METHODS if name != "squarehead")  # it is for sparse models


def run(method, layers, seed, folder, data, options):
    """Test accuracy after one training."""
    tokenizer, train, test, names = data
    set_seed(seed)
    student = init_student(minilm.classifier(folder, names), layers=layers, strategy=options.strategy)
    taught = {
        "teacher": str(folder),
        "alpha": options.alpha,
        "temperature": options.temperature,
        "matches": PRESETS.get(method, ()),
    }
    with tempfile.TemporaryDirectory() as output:
        trainer = minilm.trainer(
            student,
            output,
            tokenizer,
            train,
            test,
            seed=seed,
            num_train_epochs=options.epochs,
            learning_rate=options.learning_rate,
            bf16=options.bf16,
            **({} if method == "ce" else taught),
        )
        trainer.train()
        return {"accuracy": trainer.evaluate()["eval_accuracy"]}


def summary(students, dense):
    """For each method and depth what its seeds have in common."""
    seeds = {}
    for each in students:
        seeds.setdefault((each["layers"], each["method"]), []).append(each["accuracy"])
    return [
        {
            "layers": layers,
            "method": method,
            "seeds": len(found),
            "mean": sum(found) / len(found),
            "spread": max(found) - min(found),
            "of_dense": sum(found) / len(found) / dense,
        }
        for (layers, method), found in seeds.items()
    ]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=FOR_STUDENTS)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--strategy", default="uniform", help="which layers the student starts from")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    parser.add_argument("--alpha", type=float, default=0.5)
    parser.add_argument("--temperature", type=float, default=2.0)
    minilm.add_dense_arguments(parser)
    options = parser.parse_args()
    data, folder = minilm.dense_of(CORPUS, options)
    settings = (options.strategy, options.epochs, options.learning_rate)
    settings += (options.alpha, options.temperature)
    runs = folder.with_name("-".join([folder.name, "students", *map(str, settings)]))

    result = {**vars(options), "train_rows": len(data[1]), "test_rows": len(data[2])}
    dense = minilm.cached(runs / "dense.json", lambda: minilm.accuracy_of(folder, *data))
    result["dense"] = dense
    result["students"] = []
    asked = [
        (method, layers, seed)
        for seed in options.seeds
        for layers in options.layers
        for method in options.methods
    ]
    for method, layers, seed in tqdm(list(dict.fromkeys(asked)), desc="trainings", unit="run"):
        found = minilm.cached(
            runs / f"{method}-{layers}-layers-{seed}.json",
            lambda method=method, layers=layers, seed=seed: run(
                method, layers, seed, folder, data, options
            ),
        )
        result["students"].append({"method": method, "layers": layers, "seed": seed, **found})
    result["summary"] = summary(result["students"], dense)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
