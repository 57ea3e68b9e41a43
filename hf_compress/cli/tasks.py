"""What each task of the commands is made of: its model, its rows, how they are batched and scored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModelForAudioClassification,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    EvalPrediction,
)

from hf_compress.cli.arguments import CompressArguments
from hf_compress.cli.data import label_names, load_splits
from hf_compress.cli.inputs import collator_of, load_processor, prepared
from hf_compress.metrics import functions

AUTO_CLASSES: dict[str, Any] = {
    "text-classification": AutoModelForSequenceClassification,
    "image-classification": AutoModelForImageClassification,
    "audio-classification": AutoModelForAudioClassification,
    "causal-lm": AutoModelForCausalLM,
}


@dataclass(frozen=True)
class Data:
    """Rows as the model takes them. names: of the classes, None for a language model. split: what the
    eval rows are called. processing: see `load_processor`."""

    train: Dataset
    test: Dataset
    split: str
    names: list[str] | None
    processing: Any
    collator: Any
    compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None


def load_data(arguments: CompressArguments) -> Data:
    """Raises ValueError for what is not there or does not fit, see `hf_compress.cli.data`."""
    train, test, split = load_splits(arguments)
    processor = load_processor(arguments)
    labelled = arguments.task != "causal-lm"
    names = label_names(train, arguments.label_column) if labelled else None
    train, test = (prepared(rows, processor, arguments, names) for rows in (train, test))
    collator = collator_of(processor, labelled=labelled)
    return Data(train, test, split, names, processor, collator, compute_accuracy if labelled else None)


def compute_accuracy(prediction: EvalPrediction) -> dict[str, float]:
    chosen = np.argmax(prediction.predictions, axis=-1)
    return {"accuracy": functions.accuracy(chosen, prediction.label_ids)}


def load_model(arguments: CompressArguments, names: list[str] | None) -> Any:
    """The model in float, with a head for the classes `names`; without weights in its folder a new one.

    A head made for other classes is made anew, and transformers says so.
    """
    auto_class = AUTO_CLASSES[arguments.task]
    labels: dict[str, Any] = {}
    if names is not None:
        labels = {
            "num_labels": len(names),
            "id2label": dict(enumerate(names)),
            "label2id": {name: i for i, name in enumerate(names)},
        }
    if is_untrained(arguments.model):
        return auto_class.from_config(AutoConfig.from_pretrained(arguments.model, **labels))
    resized = {} if names is None else {"ignore_mismatched_sizes": True}
    return auto_class.from_pretrained(arguments.model, **labels, **resized)


def is_untrained(model: str) -> bool:
    """Whether it is a folder with a config and no weights."""
    folder = Path(model)
    weights = ("*.safetensors", "*.bin", "*.index.json")
    return (folder / "config.json").is_file() and not any(any(folder.glob(p)) for p in weights)
