"""Ask the teacher once about every row, and keep its answers beside the rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets import Dataset, Features, Value, concatenate_datasets
from torch import nn

from hf_compress.devices import processes
from hf_compress.distillation.cache.answers import Keeping
from hf_compress.distillation.cache.asking import Asking, Collate
from hf_compress.distillation.cache.cells import Origin
from hf_compress.distillation.cache.keys import answers_tokens, fingerprint
from hf_compress.distillation.cache.loading import default_collator, loaded, used_columns
from hf_compress.distillation.cache.states import describe, features_of
from hf_compress.distillation.divergences import Divergence
from hf_compress.distillation.tasks.heads import Head
from hf_compress.distillation.teacher import vocabulary_size
from hf_compress.frozen import evaluating
from hf_compress.targets import without_adapters

WHAT = ("logits", "topk", "sampled", "hidden", "pooled")
_BYTES = 90  # of a token's answer, which leaves room for what each row says of itself


def precompute_teacher(
    dataset: Dataset,
    teacher: nn.Module | str,
    *,
    what: str | None = None,
    data_collator: Collate | None = None,
    processing_class: Any = None,
    batch_size: int = 8,
    size: int | None = None,
    temperature: float = 2.0,
    layers: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    bits: int | None = None,
    vocabulary: int | None = None,
    remove_unused_columns: bool = True,
    folder: str | Path | None = None,
    rows_per_file: int = 1000,
    seed: int = 0,
) -> Dataset:
    """`dataset` with the teacher's answers in a column, for `DistillationTrainer(teacher="cached")`.

    A second call with what="hidden" or "pooled" adds a column for `matches` of these.

    Every row is asked about as the training will show it, so give the collator or the processing class
    of the training, and tokenize and truncate before. The answers may then be shuffled, split and saved
    with their rows; a row whose input has become another is refused in training.

    teacher: a model with a head that is known, where it is, or a path or hub id. bits: 8 or 4 loads it
        through bitsandbytes.
    what: "logits": all of them, so that the training is the one with the teacher beside it; the default
            where there are few classes.
        "sampled": of each token a few classes that were drawn, from which forward and skewed KL are
            estimated without bias (papers/2503.16870); the default for language models.
        "topk": of each token the most probable classes, and the probability of the others together: for
            any divergence of probabilities, but nothing is learnt about the others.
        "hidden", "pooled": what the `layers` give for each token, or the pooler for each row.
    size: classes of "topk" and "sampled", in [1, classes); by default as many as 90 bytes a token hold.
    temperature: the training's, for "topk" and "sampled", which know the teacher at this one only.
    layers: of "hidden", from 0, or from -1 backwards; by default the last.
    dtype: of what is kept; by default as computed, and float16 for "topk" and "sampled".
    vocabulary: compare the first so many tokens only: for a student of a vocabulary padded otherwise.
    data_collator, processing_class, remove_unused_columns: as of Trainer.
    folder: for files of `rows_per_file` rows; by default in the cache of datasets. What is there
        already is not computed again, so an interrupted call goes on. Several processes share the work.
    seed: of what is drawn.

    Raises TypeError for anything but a `datasets.Dataset`, ValueError for settings that do not fit, for
    rows without labels where these choose tokens, and for a collator that draws at random.
    """
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"`dataset` is a {type(dataset).__name__}: pass a datasets.Dataset, one split at a time."
        )
    if not len(dataset):
        raise ValueError("The dataset is empty: there is nothing to ask the teacher about.")
    model, head = loaded(teacher, bits)
    keeping = _keeping(
        model,
        head,
        what=what,
        size=size,
        temperature=temperature,
        dtype=dtype,
        vocabulary=vocabulary,
        seed=seed,
    )
    states = keeping.what in ("hidden", "pooled")
    if layers is not None and not states:
        raise ValueError(f"`layers` is {list(layers)}, but it goes with what='hidden'.")
    columns = dataset.column_names
    if remove_unused_columns:
        columns = used_columns(columns, model, head)
    asking = Asking(
        model=model,
        head=head,
        collate=data_collator or default_collator(processing_class),
        columns=columns,
        keeping=keeping,
        origin=_origin(model, head, keeping, bits),
        features=features_of(without_adapters(model), keeping.what, layers) if states else (),
    )
    return _in_files(dataset, asking, batch_size, folder, rows_per_file)


def _in_files(
    dataset: Dataset, asking: Asking, batch_size: int, folder: str | Path | None, rows_per_file: int
) -> Dataset:
    identity = f"{asking.identity(dataset, min(batch_size, len(dataset)))} {rows_per_file}"
    name = blake2b(identity.encode(), digest_size=8).hexdigest()
    parent = Path(datasets.config.HF_DATASETS_CACHE) / "hf_compress" if folder is None else Path(folder)
    place = parent / f"teacher-{name}"
    place.mkdir(parents=True, exist_ok=True)
    files = math.ceil(len(dataset) / rows_per_file)

    def file(number: int) -> Dataset:
        start = number * rows_per_file
        part = dataset.select(range(start, min(start + rows_per_file, len(dataset))))
        return part.map(
            lambda _, rows: asking.answers(part, rows),
            with_indices=True,
            batched=True,
            batch_size=batch_size,
            writer_batch_size=batch_size,
            features=Features({**part.features, asking.column: Value("large_binary")}),
            cache_file_name=str(place / f"{number:05d}.arrow"),
            load_from_cache_file=True,
            new_fingerprint=f"{name}{number:05d}",
            desc=f"Teacher, file {number + 1} of {files}",
        )

    state = processes()
    with evaluating(asking.model):
        for number in range(state.process_index, files, state.num_processes):
            file(number)
        state.wait_for_everyone()
        return concatenate_datasets([file(number) for number in range(files)])


def _keeping(
    model: nn.Module,
    head: Head,
    *,
    what: str | None,
    size: int | None,
    temperature: float,
    dtype: torch.dtype | None,
    vocabulary: int | None,
    seed: int,
) -> Keeping:
    many = head.writes_text and answers_tokens(head)
    what = what or ("sampled" if many else "logits")
    if what not in WHAT:
        raise ValueError(f"`what` is {what!r}: pass one of {', '.join(map(repr, WHAT))}.")
    if vocabulary is not None and not many:
        raise ValueError(f"`vocabulary` is {vocabulary}, but {head.name} answers with no tokens.")
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"`dtype` is {dtype}: pass a float type, such as torch.bfloat16.")
    if what not in ("topk", "sampled"):
        if size is not None:
            raise ValueError(f"`size` is {size}, but it goes with what='topk' or 'sampled'.")
        return Keeping(what=what, size=None, temperature=None, dtype=dtype, classes=vocabulary, seed=0)
    if not answers_tokens(head):
        raise ValueError(f"`what` is {what!r}, but of {head.name} all logits are kept: 'logits'.")
    Divergence(temperature=temperature)  # raises ValueError where it is out of range
    if size is None:
        classes = vocabulary or vocabulary_size(without_adapters(model).config) or 0
        size = min(_BYTES // (4 if classes <= 1 << 16 else 5), classes - 1)
    return Keeping(
        what=what,
        size=size,
        temperature=float(temperature),
        dtype=dtype,
        classes=vocabulary,
        seed=seed if what == "sampled" else 0,
    )


def _origin(model: nn.Module, head: Head, keeping: Keeping, bits: int | None) -> Origin:
    config = without_adapters(model).config
    labels, classes = None, None
    if head.predicts_labels:
        classes = config.num_labels
        labels = tuple(config.id2label[i] for i in range(classes))
    elif head.writes_text:
        classes = keeping.classes or vocabulary_size(config)
    return Origin(
        what=keeping.what,
        head=head.name,
        teacher=fingerprint(model),
        precision=f"{bits} bit" if bits else str(next(model.parameters()).dtype).removeprefix("torch."),
        name=config.name_or_path,
        classes=classes,
        cut=keeping.classes is not None,
        labels=labels,
        same=tuple(getattr(config, name, None) for name in head.same),
        temperature=keeping.temperature,
        config=describe(config) if keeping.what in ("hidden", "pooled") else None,
    )
