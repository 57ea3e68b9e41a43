"""How much a distillation's loss and gradient depend on how a batch is cut, for every head.

    pip install -e ".[test]"
    python benchmarks/invariance.py

The tiny models and ragged rows of the test suite, with labels left out, so that micro-batches have
different numbers of items and some have none: eight rows of one optimizer step as 8 x 1 (batch x
accumulation), 2 x 4, and on two processes 4 x 1 and 2 x 2; and a second step of four rows more, an
incomplete window. `ours` is the largest relative difference from 8 x 1 of losses, gradient norm and
evaluation in any cut; `trainer` the same of transformers' own Trainer without a teacher, its loss and
gradient norm for 2 x 4 on one process alone. Prints JSON.
"""

import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from distillation import grid
from distillation.grid import CASES, run_cuts
from distributed.accelerated import accelerate_launch
from transformers import Trainer, TrainingArguments


def two_processes():
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder, "results.json")
        accelerate_launch(grid.__file__, str(written))
        return json.loads(written.read_text())


def numbers(measured, steps):
    logs = [*measured["steps"][:steps], measured["eval"]]
    return [value for log in logs for value in log.values()]


def difference(measured, expected, steps=2):
    pairs = zip(numbers(measured, steps), numbers(expected, steps), strict=True)
    return max(abs(ours - theirs) / abs(theirs) for ours, theirs in pairs if theirs)


def plain(case, batch_size, accumulation):
    """Loss and norm of one step of Trainer itself."""
    make, config, rows = CASES[case]
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            logging_steps=1,
            max_grad_norm=1e9,
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            train_sampling_strategy="sequential",
        )
        trainer = Trainer(make(seed=0, **config), args, train_dataset=rows)
        trainer.train()
    log = trainer.state.log_history[0]
    return [log["loss"], log["grad_norm"]]


def of_trainer(case):
    whole, cut = plain(case, 8, 1), plain(case, 2, 4)
    return max(abs(a - b) / abs(b) for a, b in zip(cut, whole, strict=True))


def main():
    alone, together = run_cuts([(8, 1), (2, 4)]), two_processes()
    heads = {}
    for case in CASES:
        whole = alone[case]["8x1"]
        ours = max(
            difference(alone[case]["2x4"], whole),
            # Of the second step accelerate repeats rows, too few for two batches of four.
            difference(together[case]["4x1"], whole, steps=1),
            difference(together[case]["2x2"], whole),
        )
        heads[case] = {"ours": ours, "trainer": of_trainer(case)}
    print(
        json.dumps(
            {
                **{name: version(name) for name in ("torch", "transformers", "accelerate")},
                "largest": max(each["ours"] for each in heads.values()),
                "heads": heads,
            }
        )
    )


if __name__ == "__main__":
    main()
