"""Batches to evaluate a published model on, from any of the datasets that the commands take."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from datasets import ClassLabel, Dataset
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import (
    AutoFeatureExtractor,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    default_data_collator,
)

from hf_compress.cli.arguments import CompressArguments, DataArguments, Task
from hf_compress.cli.data import first_rows, held_out, load_all
from hf_compress.cli.inputs import collator_of, load_processor, longest, prepared
from hf_compress.publishing.scores import task_of

_TASKS: dict[str, Task] = {
    "pixel_values": "image-classification",
    "input_values": "audio-classification",
    "input_features": "audio-classification",
}


def task_of_inputs(model: PreTrainedModel) -> Task:
    """Of classifying what `model` reads."""
    return _TASKS.get(model.main_input_name, "text-classification")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How rows were made for an evaluation: what `report.json` keeps so that it can be done again.

    split: name of the split; with `tenth_of` no split, but a tenth of the one of that name; None for
        the only one, or "test" or "validation". text_column, image_column, audio_column, label_column:
        of raw rows; None for what the model does not read.
    max_length: tokens of a row; None for as many as the model takes. max_seconds: of raw sound; None
        where there is none. rows: so many of them at random, None for all. batch_size: rows of a batch,
        on which Trainer's mean of the loss depends.
    """

    split: str | None = None
    tenth_of: str | None = None
    dataset_config: str | None = None
    text_column: str | None = "text"
    image_column: str | None = None
    audio_column: str | None = None
    label_column: str | None = "label"
    max_length: int | None = None
    max_seconds: float | None = None
    rows: int | None = None
    batch_size: int = 32

    @classmethod
    def of(cls, arguments: CompressArguments, *, split: str, batch_size: int) -> Evaluation:
        """Of a command. split: what `load_splits` calls it."""
        there = split == arguments.eval_split
        reads, hears = arguments.reads_text, arguments.task == "audio-classification"
        sees = arguments.task == "image-classification"
        return cls(
            split=split if there else None,
            tenth_of=None if there else arguments.train_split,
            dataset_config=arguments.dataset_config,
            text_column=arguments.text_column if reads else None,
            image_column=arguments.image_column if sees else None,
            audio_column=arguments.audio_column if hears else None,
            label_column=None if arguments.task == "causal-lm" else arguments.label_column,
            max_length=arguments.max_length if reads else None,
            max_seconds=arguments.max_seconds if hears else None,
            rows=arguments.max_eval_rows,
            batch_size=batch_size,
        )


def load_rows(model: PreTrainedModel, folder: Path, data: str, how: Evaluation) -> Dataset:
    """Rows that `batches` takes. Those that have the inputs of the model already stay as they are.

    data: as `hf_compress.cli.arguments.DataArguments.dataset`. folder: of `model` and its tokenizer.

    Raises ValueError for a split or column that is not there, labels that the model does not know, and
    raw rows where the folder has no tokenizer.
    """
    arguments = DataArguments(model=str(folder), dataset=data, dataset_config=how.dataset_config)
    splits = load_all(arguments)
    name = how.split or next((n for n in ("test", "validation", *splits) if n in splits), "")
    if how.tenth_of in splits:
        rows = held_out(splits[how.tenth_of])[1]
    elif name in splits:
        rows = splits[name]
    else:
        raise ValueError(f"{data} has no split {name!r}: {sorted(splits)}.")
    rows = first_rows(rows, how.rows)
    if model.main_input_name in rows.column_names:
        return rows
    for name, value in asdict(how).items():
        if value is not None and name.endswith(("_column", "max_length", "max_seconds")):
            setattr(arguments, name, value)
    causal = task_of(model) == "tokens"
    arguments.task = "causal-lm" if causal else task_of_inputs(model)
    if arguments.reads_text:
        tokenizer = load_folder_tokenizer(folder)
        if tokenizer is None:
            raise ValueError(
                f"{data} has no column {model.main_input_name!r}, and the model no tokenizer: pass "
                "rows of what the model takes."
            )
        arguments.max_length = how.max_length or longest(model.config, tokenizer)
    column = arguments.input_column
    for name in [column] if causal else [column, arguments.label_column]:
        if name not in rows.column_names:
            raise ValueError(f"{data} has no column {name!r}, only {rows.column_names}.")
    names = None if causal else _class_names(rows, arguments.label_column, model)
    return prepared(rows, load_processor(arguments), arguments, names)


def batches(rows: Dataset, folder: Path, batch_size: int) -> Iterator[dict[str, Tensor]]:
    """In the order of the rows, padded to the longest row of each batch."""
    collate: Any = default_data_collator
    processor: Any = None
    if "input_ids" in rows.column_names:
        processor = load_folder_tokenizer(folder)
    elif "input_values" in rows.column_names and (folder / "preprocessor_config.json").is_file():
        processor = AutoFeatureExtractor.from_pretrained(folder)
    labels = next((name for name in ("labels", "label") if name in rows.column_names), None)
    # Rows that have labels of their own tokens come padded.
    if processor is not None and not (labels and isinstance(rows[0][labels], list)):
        collate = collator_of(processor, labelled=labels is not None)
    yield from DataLoader(rows, batch_size=batch_size, collate_fn=collate)


def load_folder_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """None where the folder has none."""
    known = (folder / "tokenizer_config.json").is_file()
    return AutoTokenizer.from_pretrained(folder) if known else None


def _class_names(rows: Dataset, column: str, model: PreTrainedModel) -> list[str]:
    """Names in the order of the model's classes, as the rows write them: its own where these are used,
    else those of the dataset, or numbers."""
    feature, config = rows.features[column], cast(Any, model.config)
    count: int = config.num_labels
    own = [str(config.id2label[place]) for place in range(count)]
    if isinstance(feature, ClassLabel):
        used = set(feature.names)
        if not used <= set(own) and len(feature.names) == count:
            return list(feature.names)
    else:
        used = {str(value) for value in set(rows[column])}
    numbers = [str(place) for place in range(count)]
    for names in (own, numbers):
        if used <= set(names):
            return names
    raise ValueError(
        f"the labels {sorted(used)[:5]} of the rows are none of the model's {count}: {own[:5]}."
    )
