"""Students of MiniLM with 2 and 3 of its 6 layers on 20 Newsgroups: from the labels alone, from the
teacher's logits by any divergence, and by each preset from inside the teacher too.

    python benchmarks/students_20newsgroups.py --student_rows 4000 --methods ce kd minilmv2 --layers 2

Every method starts from the same layers of the teacher and its head, and is judged by `--test_rows` of
the test split; with `--tune` by its other rows, which is where settings are chosen. With `--sparsity`
the student is pruned too: `--layers 6 --sparsity 0.95 --methods kd squarehead`. Each run is kept in the
cache as soon as it is done, so that a stopped sweep goes on where it was. Prints JSON: `spread` is the
best minus the worst accuracy of the seeds, `of_dense` the share of the mean in the teacher's.
"""

import argparse
import json
import tempfile
from dataclasses import replace

import minilm
import torch
from tqdm import tqdm
from transformers import DataCollatorWithPadding, set_seed

from hf_compress import PruningCallback, init_student, precompute_teacher
from hf_compress.callbacks.distillation import AnnealingCallback
from hf_compress.distillation.divergences import DIVERGENCES
from hf_compress.distillation.features.presets import PRESETS
from hf_compress.schedules import Schedule

CORPUS = "20newsgroups"
BY_LOGITS = {"kd": "forward_kl"} | {name: name for name in DIVERGENCES if name != "forward_kl"}
METHODS = ("ce", *BY_LOGITS, *PRESETS)
FOR_STUDENTS = ("ce", "kd", *(name for name in PRESETS if name != "squarehead"))


def rows_of(data, options):
    """The rows that the students see, and those that judge them."""
    tokenizer, train, test, names = data
    train, test = train.shuffle(seed=0), test.shuffle(seed=0)
    count = options.test_rows or len(test)
    judges = range(count, len(test)) if options.tune else range(count)
    seen = range(options.student_rows or len(train))
    return tokenizer, train.select(seen), test.select(judges), names


def answered(folder, data, options):
    """The students' rows with the logits of their teacher."""
    tokenizer, train, _, names = data
    with torch.autocast("cpu", torch.bfloat16, enabled=options.bf16):
        return precompute_teacher(
            train,
            minilm.classifier(folder, names),
            data_collator=DataCollatorWithPadding(tokenizer),
            batch_size=64,
            folder=minilm.CACHE / "answers",
        )


def matches_of(method, options):
    return [
        replace(match, weight=match.weight * options.match_weight) for match in PRESETS.get(method, ())
    ]


def callbacks(matches, options):
    found = []
    if options.sparsity:
        found.append(PruningCallback(options.sparsity))
    if matches and options.inside_until < 1:
        weights = {
            match.name or match.what: Schedule(
                initial=match.weight, final=0.0, shape="constant", start=options.inside_until
            )
            for match in matches
        }
        found.append(AnnealingCallback(weights=weights))
    return found


def run(method, layers, seed, folder, data, answers, options):
    """Test accuracy after one training."""
    tokenizer, train, test, names = data
    set_seed(seed)
    student = init_student(minilm.classifier(folder, names), layers=layers, strategy=options.strategy)
    matches = matches_of(method, options)
    taught = {
        "teacher": "cached" if method in BY_LOGITS else str(folder),
        "alpha": options.alpha,
        "temperature": options.temperature,
        "divergence": BY_LOGITS.get(method, "forward_kl"),
        "matches": matches,
    }
    with tempfile.TemporaryDirectory() as output:
        minilm.trainer(
            student,
            output,
            tokenizer,
            answers if method in BY_LOGITS else train,
            None,
            callbacks(matches, options),
            seed=seed,
            num_train_epochs=options.epochs,
            learning_rate=options.learning_rate,
            bf16=options.bf16,
            **({} if method == "ce" else taught),
        ).train()
        judge = minilm.trainer(student, output, tokenizer, None, test, bf16=options.bf16)
        return {"accuracy": judge.evaluate()["eval_accuracy"]}


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
    parser.add_argument("--student_rows", type=int, help="of the teacher's, at random; all by default")
    parser.add_argument("--test_rows", type=int, help="that judge, at random; all by default")
    parser.add_argument("--tune", action="store_true", help="be judged by the other test rows")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    parser.add_argument("--alpha", type=float, default=0.5)
    parser.add_argument("--temperature", type=float, default=2.0)
    parser.add_argument("--match_weight", type=float, default=1.0, help="times that of each preset")
    parser.add_argument(
        "--inside_until", type=float, default=1.0, help="fraction of the training with matches"
    )
    parser.add_argument("--sparsity", type=float, default=0.0)
    minilm.add_dense_arguments(parser)
    options = parser.parse_args()
    data, folder = minilm.dense_of(CORPUS, options)
    data = rows_of(data, options)
    answers = answered(folder, data, options) if BY_LOGITS.keys() & set(options.methods) else None
    judged = f"{'tune' if options.tune else 'test'}-{len(data[2])}"
    settings = (len(data[1]), judged, options.strategy, options.epochs, options.learning_rate)
    settings += (options.alpha, options.temperature, options.match_weight, options.inside_until)
    settings += (options.sparsity,)
    runs = folder.with_name(f"{folder.name}-students") / "-".join(map(str, settings))

    result = {**vars(options), "rows_of_students": len(data[1]), "rows_that_judge": len(data[2])}
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
                method, layers, seed, folder, data, answers, options
            ),
        )
        result["students"].append({"method": method, "layers": layers, "seed": seed, **found})
    result["summary"] = summary(result["students"], dense)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
