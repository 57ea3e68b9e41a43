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
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedTokenizerBase,
    default_data_collator,
)

from hf_compress.cli.arguments import CompressArguments
from hf_compress.cli.data import (
    label_names,
    load_image_processor,
    load_splits,
    load_tokenizer,
    tokenized,
    with_pixels,
)
from hf_compress.metrics import functions

AUTO_CLASSES: dict[str, Any] = {
    "text-classification": AutoModelForSequenceClassification,
    "image-classification": AutoModelForImageClassification,
    "causal-lm": AutoModelForCausalLM,
}


@dataclass(frozen=True)
class Data:
    """Rows as the model takes them. names: of the classes, None for a language model. split: what the
    eval rows are called. processing: the tokenizer, or the image processor."""

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
    if arguments.task == "image-classification":
        processor = load_image_processor(arguments.model)
        names = label_names(train, arguments.label_column)
        train, test = (with_pixels(rows, processor, arguments, names) for rows in (train, test))
        return Data(train, test, split, names, processor, default_data_collator, compute_accuracy)
    tokenizer = load_tokenizer(arguments)
    if arguments.task == "text-classification":
        names = label_names(train, arguments.label_column)
        train, test = (tokenized(rows, tokenizer, arguments, names) for rows in (train, test))
        collator = DataCollatorWithPadding(tokenizer)
        return Data(train, test, split, names, tokenizer, collator, compute_accuracy)
    train, test = (tokenized(rows, tokenizer, arguments, None) for rows in (train, test))
    return Data(train, test, split, None, tokenizer, language_collator(tokenizer), None)


def language_collator(tokenizer: PreTrainedTokenizerBase) -> DataCollatorForLanguageModeling:
    """Of a causal language model, whose padding has no labels."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return DataCollatorForLanguageModeling(tokenizer, mlm=False)


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
