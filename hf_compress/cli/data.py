"""From a name to tokenized splits, for text classification and causal language modelling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, load_dataset, load_from_disk
from transformers import PreTrainedTokenizerBase

from hf_compress.cli.arguments import CompressArguments
from hf_compress.samples import CORPORA, corpus

_READERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def load_splits(arguments: CompressArguments) -> tuple[Dataset, Dataset]:
    """Raw train and eval split. A dataset without the eval split gives a tenth of its train rows.

    Raises ValueError for a split or column that is not there, and for an empty split.
    """
    data = _load(arguments)
    if arguments.train_split not in data:
        raise ValueError(f"{arguments.dataset} has no split {arguments.train_split!r}: {sorted(data)}.")
    train = data[arguments.train_split]
    if arguments.eval_split in data:
        test = data[arguments.eval_split]
    else:
        parts = train.train_test_split(test_size=0.1, seed=0)
        train, test = parts["train"], parts["test"]
    wanted = [arguments.text_column]
    if arguments.task == "text-classification":
        wanted.append(arguments.label_column)
    for column in wanted:
        if column not in train.column_names:
            raise ValueError(
                f"{arguments.dataset} has no column {column!r}, only {train.column_names}: name it by "
                "`text_column` and `label_column`."
            )
    train, test = _first(train, arguments.max_train_rows), _first(test, arguments.max_eval_rows)
    for split, rows in (("train", train), ("eval", test)):
        if len(rows) == 0:
            raise ValueError(f"the {split} split of {arguments.dataset} is empty.")
    return train, test


def label_names(train: Dataset, column: str) -> list[str]:
    """Names of the classes in `column`: a ClassLabel, strings or whole numbers, in order."""
    feature = train.features[column]
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    return [str(value) for value in sorted(set(train[column]))]


def tokenized(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    arguments: CompressArguments,
    names: list[str] | None,
) -> Dataset:
    """Rows of token ids, cut to `max_length`; `labels` are indices into `names`, or the ids."""
    text, label = arguments.text_column, arguments.label_column
    classes = names is not None and isinstance(rows.features[label], ClassLabel)

    def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
        encoded = tokenizer(batch[text], truncation=True, max_length=arguments.max_length)
        if names is None:
            return dict(encoded)
        values = batch[label] if classes else [names.index(str(value)) for value in batch[label]]
        return {**encoded, "labels": values}

    return rows.map(encode, batched=True, remove_columns=rows.column_names, desc="Tokenizing")


def _load(arguments: CompressArguments) -> DatasetDict:
    name = arguments.dataset
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


def _first(rows: Dataset, count: int | None) -> Dataset:
    return rows if count is None else rows.shuffle(seed=0).select(range(min(count, len(rows))))
