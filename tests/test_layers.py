"""Only downward: the maths knows nothing of the Trainer, and the top-level folder has one name."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_KNOW_THE_TRAINER = ("callbacks", "cli", "distillation/trainer.py", "distillation/arguments.py")
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
    allowed = "transformers.trainer_pt_utils.LayerWiseDummyOptimizer"
    for name in imported(path):
        if path.name == "__init__.py" and path.parent.name == "hf_compress":
            continue  # type-checking names only; imports happen on first use
        assert name == allowed or "rainer" not in name.removeprefix("hf_compress."), (path, name)
        assert not name.startswith("hf_compress.callbacks"), (path, name)
