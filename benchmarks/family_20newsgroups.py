"""MiniLM at 50 to 90 % in one training on 20 Newsgroups: the model that FamilyCallback keeps of each.

    python benchmarks/family_20newsgroups.py --rows 4000 --bf16 --output family

The models are distilled from their dense self along one linear ramp, and chosen by the first
`--chosen_by` test rows; the accuracy that is printed is that of the others. Prints JSON, and leaves the
models and the curve in `--output`.
"""

import argparse
import json
import tempfile
from pathlib import Path

import minilm
from transformers import set_seed

from hf_compress import FamilyCallback, PruningCallback


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--eval_steps", type=int, default=25)
    parser.add_argument("--chosen_by", type=int, default=1000, help="rows")
    parser.add_argument("--output", required=True)
    minilm.add_dense_arguments(parser)
    options = parser.parse_args()
    (tokenizer, train, test, names), folder = minilm.dense_of("20newsgroups", options)
    choosing = test.select(range(options.chosen_by))
    rest = test.select(range(options.chosen_by, len(test)))

    set_seed(0)
    pruning = PruningCallback(0.9, schedule="linear", end=1.0)
    family = FamilyCallback(pruning, folder=options.output)
    with tempfile.TemporaryDirectory() as output:
        minilm.trainer(
            minilm.classifier(folder, names),
            output,
            tokenizer,
            train,
            choosing,
            callbacks=[pruning, family],
            teacher=str(folder),
            num_train_epochs=options.epochs,
            learning_rate=options.learning_rate,
            bf16=options.bf16,
            eval_strategy="steps",
            eval_steps=options.eval_steps,
            metric_for_best_model="accuracy",
            greater_is_better=True,
        ).train()
    kept = json.loads((Path(options.output) / "family.json").read_text())
    for relative in kept.values():
        model = Path(options.output) / relative["folder"]
        relative["accuracy"] = minilm.accuracy_of(model, tokenizer, train, rest, names)
    dense = minilm.accuracy_of(folder, tokenizer, train, rest, names)
    print(json.dumps({**vars(options), "test_rows": len(rest), "dense": dense, "family": kept}))


if __name__ == "__main__":
    main()
