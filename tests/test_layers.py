"""Only downward: the maths knows nothing of the Trainer, and the top-level folder has one name."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_KNOW_THE_TRAINER = (
    "callbacks",
    "cli",
    "distillation/trainer",
    "distillation/arguments.py",
    "publishing/trainers.py",
    "verify.py",
)
ABOVE = (
    "transformers.trainer.",
    "transformers.trainer_callback.",
    "transformers.training_args",
    "hf_compress.callbacks",
    "hf_compress.cli",
    "hf_compress.distillation.trainer",
    "hf_compress.distillation.arguments",
)
TRAINER_CLASSES = ("Trainer", "Seq2SeqTrainer", "TrainerCallback", "TrainingArguments")
MODULES = [
    path
    for path in (ROOT / "hf_compress").rglob("*.py")
    if not path.relative_to(ROOT / "hf_compress").as_posix().startswith(MAY_KNOW_THE_TRAINER)
]


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_below_imports_the_trainer(path):
    for name in imported(path):
        if path.name == "__init__.py" and path.parent.name == "hf_compress":
            continue  # type-checking names only; imports happen on first use
        assert not name.startswith(ABOVE), (path, name)
        assert name.rpartition(".")[2] not in TRAINER_CLASSES, (path, name)
