"""A real model compressed on real data, end to end, from packages alone.

Fine-tunes all-MiniLM-L6-v2 on Reuters R8; trains a student of half its layers from it, with the
teacher in 8 bit, while the student is pruned; publishes it to a folder; reloads it in a fresh process
that cannot import hf_compress, and evaluates it there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer, DataCollatorWithPadding, Trainer, set_seed

from hf_compress.callbacks.pruning import PruningCallback
from hf_compress.cli.arguments import CompressArguments
from hf_compress.cli.checks import check_folder
from hf_compress.cli.data import label_names, load_splits
from hf_compress.cli.errors import refusing
from hf_compress.cli.inputs import tokenized
from hf_compress.cli.published import print_table, publish_run
from hf_compress.cli.tasks import compute_accuracy, load_model
from hf_compress.distillation.arguments import DistillationArguments
from hf_compress.distillation.layers import init_student
from hf_compress.distillation.trainer import DistillationTrainer

LENGTH = 40
BATCH = 32

# Runs with `python -I`: neither the checkout nor PYTHONPATH is on its path.
_STRANGER = """
import json, sys
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
sys.path = [place for place in sys.path if "hf_compress" not in place]
folder, rows = sys.argv[1], json.load(sys.stdin)
model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
right = 0
for start in range(0, len(rows["text"]), 64):
    texts, labels = rows["text"][start:start + 64], rows["label"][start:start + 64]
    batch = tokenizer(texts, truncation=True, max_length=%d, padding=True, return_tensors="pt")
    with torch.no_grad():
        right += int((model(**batch).logits.argmax(-1) == torch.tensor(labels)).sum())
assert "hf_compress" not in sys.modules
print(right / len(rows["text"]))
"""


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", default="runs/quickstart")
    parser.add_argument("--sparsity", type=float, default=0.8)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--teacher_epochs", type=float, default=1.0)
    parser.add_argument("--student_epochs", type=float, default=1.5)
    parser.add_argument("--rows", type=int, help="use so many training and test rows, for a quick look")
    options = parser.parse_args(argv)
    folder = Path(options.output_dir)
    set_seed(0)
    with refusing():
        check_folder(options.output_dir)
        # Refuses a wrong sparsity now rather than after the teacher is trained.
        pruning = PruningCallback(options.sparsity)
        arguments = CompressArguments(
            model="all-minilm-l6-v2",
            dataset="reuters-r8",
            max_length=LENGTH,
            max_train_rows=options.rows,
            max_eval_rows=options.rows,
        )
        train, test, split = load_splits(arguments)
    names = label_names(train, arguments.label_column)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    teacher = load_model(arguments, names)
    data: dict[str, Any] = {
        "train_dataset": tokenized(train, tokenizer, arguments, names),
        "eval_dataset": tokenized(test, tokenizer, arguments, names),
        "processing_class": tokenizer,
        "data_collator": DataCollatorWithPadding(tokenizer),
        "compute_metrics": compute_accuracy,
    }
    tuning = Trainer(teacher, _arguments(folder, options.teacher_epochs), **data)
    tuning.train()

    trainer = DistillationTrainer(
        init_student(teacher, options.layers),
        _arguments(folder, options.student_epochs),
        teacher=teacher,
        teacher_bits=8,
        callbacks=[pruning],
        **data,
    )
    trainer.train()
    name = f"minilm-r8-{options.layers}layers-sparse{100 * options.sparsity:.0f}"
    student = folder / name
    publish_run(
        trainer,
        arguments,
        student,
        split=split,
        baseline=teacher,
    )
    print_table(student, "teacher", "student")
    reloaded = evaluate_as_a_stranger(student, test)
    print(f"reloaded from {student} by plain transformers: accuracy {reloaded:.4g}")


def evaluate_as_a_stranger(folder: Path, test: Dataset) -> float:
    """Accuracy of the saved model, by plain transformers in a fresh isolated process."""
    rows = {"text": list(test["text"]), "label": list(test["label"])}
    run = subprocess.run(
        [sys.executable, "-I", "-c", _STRANGER % LENGTH, str(folder)],
        input=json.dumps(rows),
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode != 0:
        raise RuntimeError(f"the saved model does not load without hf_compress:\n{run.stderr[-2000:]}")
    return float(run.stdout)


def _arguments(folder: Path, epochs: float) -> DistillationArguments:
    return DistillationArguments(
        str(folder / "training"),
        num_train_epochs=epochs,
        learning_rate=3e-4,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=64,
        warmup_steps=0.1,
        logging_steps=20,
        save_strategy="no",
        report_to="none",
        temperature=2.0,
        alpha=0.5,
        seed=0,
    )
