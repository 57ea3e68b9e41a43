"""What the commands can be told, on the command line and in a recipe."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from hf_compress.samples import CORPORA, MODELS, packaged_model

Task = Literal["text-classification", "image-classification", "audio-classification", "causal-lm"]


@dataclass(kw_only=True)
class DataArguments:
    """Model and data, of every command."""

    model: str = field(
        metadata={
            "help": "Path or hub id of the model to compress, or the name of a packaged one: "
            f"{', '.join(MODELS)}."
        }
    )
    dataset: str | None = field(
        default=None,
        metadata={
            "help": "Hub id, a folder written by save_to_disk, a csv/json/parquet file, or the name of "
            f"a packaged corpus: {', '.join(CORPORA)}."
        },
    )
    task: Task = "text-classification"
    dataset_config: str | None = None
    train_split: str = "train"
    text_column: str = "text"
    image_column: str = "image"
    audio_column: str = field(
        default="audio",
        metadata={"help": "Of `datasets.Audio`, or with the samples as `array` and `sampling_rate`."},
    )
    label_column: str = "label"
    max_length: int = field(default=128, metadata={"help": "Tokens for each row; longer ones are cut."})
    max_seconds: float = field(
        default=10.0,
        metadata={
            "help": "Of raw sound; longer rows are cut. A spectrogram has the length of its extractor."
        },
    )

    def __post_init__(self) -> None:
        if self.model in MODELS:
            self.model = packaged_model(self.model)

    @property
    def input_column(self) -> str:
        """Of what the model reads."""
        columns = {
            "image-classification": self.image_column,
            "audio-classification": self.audio_column,
        }
        return columns.get(self.task, self.text_column)

    @property
    def reads_text(self) -> bool:
        """Whether the model reads tokens."""
        return self.task in ("text-classification", "causal-lm")


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
class QuantizationArguments:
    """Few bits: trained on an integer grid, or as a frozen base of trained adapters."""

    bits: int | None = field(
        default=None,
        metadata={"help": "Train on an integer grid of so many bits (QuantizationCallback), 2 to 8."},
    )
    group_size: int | None = field(
        default=None, metadata={"help": "bits: weights that share a scale; by default a whole row."}
    )
    grid: str | None = field(default=None, metadata={"help": "bits: mse (the default), absmax, ..."})
    format: str = field(
        default="dense",
        metadata={"help": "bits: how they are stored, dense (floats), compressed-tensors or torchao."},
    )
    load_bits: int | None = field(
        default=None,
        metadata={"help": "Load `model` in 4 or 8 bit by bitsandbytes, and train LoRA adapters on it."},
    )
    lora_rank: int = field(default=16, metadata={"help": "load_bits: rank of the adapters."})


@dataclass(kw_only=True)
class CardArguments:
    """What only the user can tell of the model."""

    base_model: str | None = field(
        default=None, metadata={"help": "Hub id of `model`, where that is a folder."}
    )
    license: str | None = field(default=None, metadata={"help": "Of the Hub's identifiers: mit, ..."})
    language: str | None = field(default=None, metadata={"help": "ISO 639 code, such as en."})
    measure_memory: bool = field(
        default=False, metadata={"help": "The peak memory of both models too, not of adapters."}
    )


@dataclass(kw_only=True)
class CompressArguments(CardArguments, QuantizationArguments, MethodArguments, DataArguments):
    """Model, data and method. Training settings (learning rate, epochs, ...) are those of
    `TrainingArguments`, `temperature` and `alpha` those of `DistillationArguments`."""

    eval_split: str = "test"
    max_train_rows: int | None = None
    max_eval_rows: int | None = None
    dense_epochs: float | None = field(
        default=None,
        metadata={
            "help": "First fine-tune `model` itself, for so many epochs: that is then the model to "
            "compress and the dense one of the card. Needed by a folder with a config and no weights."
        },
    )
    teacher: str | None = field(
        default=None,
        metadata={
            "help": 'Path, hub id, name of a packaged model, "self", or "dense": what `dense_epochs` '
            "made; none without it."
        },
    )
    teacher_bits: int | None = field(default=None, metadata={"help": "8 or 4."})
    student_layers: int | None = field(
        default=None, metadata={"help": "Train a student of so many layers of `model`."}
    )

    def __post_init__(self) -> None:
        self.base_model = self.base_model or MODELS.get(self.model)
        if self.teacher in MODELS:
            self.teacher = packaged_model(self.teacher)
        super().__post_init__()


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
