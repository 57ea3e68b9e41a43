"""The teacher that is not there: its answers come with the batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCTC

from hf_compress.distillation.alignment import Classes, label_classes
from hf_compress.distillation.cache.answers import restored
from hf_compress.distillation.cache.cells import OUTPUTS, Origin, from_bytes
from hf_compress.distillation.cache.collator import CachedCollator
from hf_compress.distillation.tasks.heads import Head, head_of
from hf_compress.distillation.teacher import vocabulary_size
from hf_compress.targets import without_adapters


class CachedTeacher:
    """A `Teacher` for `student` whose answers have this `origin`.

    Raises ValueError where it cannot teach `student`.
    """

    def __init__(self, student: nn.Module, head: Head, origin: Origin) -> None:
        self._student: Any = without_adapters(student)
        self._head = head
        self._origin = origin
        self._classes = _classes(self._student.config, head, origin)

    def __call__(self, features: Mapping[str, Any]) -> Any:
        answers = dict(features[OUTPUTS])
        if self._head.auto_class is AutoModelForCTC:
            answers["logits"] = self._framed(answers["logits"], features)
        if self._classes is not None:
            answers["logits"] = answers["logits"][..., self._classes]
        return restored(answers, self._origin)

    def _framed(self, logits: torch.Tensor, features: Mapping[str, Any]) -> torch.Tensor:
        """With as many frames as the batch has, of which those that count are there."""
        sound = features[self._student.main_input_name]
        samples = torch.tensor(sound.shape[1])
        frames = int(self._student._get_feat_extract_output_lengths(samples))
        return torch.nn.functional.pad(logits, (0, 0, 0, frames - logits.shape[1]))


def cached_teacher(
    student: nn.Module, datasets: Iterable[Any], collate: Any, *, bits: int | str | None
) -> tuple[list[CachedTeacher], CachedCollator]:
    """The teacher whose answers all `datasets` bring along, and the collator `collate` with them.

    Raises ValueError where there are none, where they do not fit, and for `bits`.
    """
    if bits is not None:
        raise ValueError(
            f"teacher='cached' is as precise as it was when it was asked: leave out `teacher_bits` "
            f"({bits}), and pass precompute_teacher(bits=...)."
        )
    origin = common_origin(datasets)
    inner: Any = without_adapters(student)
    collator = CachedCollator(collate, origin, inner.main_input_name)
    return [CachedTeacher(student, head_of(student), origin)], collator


def common_origin(datasets: Iterable[Any]) -> Origin:
    """Of the answers in the first rows of `datasets`, some of which may be None, or several by name.

    Raises ValueError where there are none, or where they are not equal.
    """
    parts = [
        part for rows in datasets for part in (rows.values() if isinstance(rows, dict) else [rows])
    ]
    origins = {_origin(part) for part in parts if part is not None}
    if len(origins) != 1:
        raise ValueError(
            "teacher='cached' needs datasets with answers of one teacher, kept in one way, but there "
            f"are {sorted(origins) or 'no datasets'}. Use `precompute_teacher` on all of them, with "
            "the same settings."
        )
    return Origin.from_json(origins.pop())


def _origin(dataset: Any) -> str:
    row: Mapping[str, Any] = next(iter(dataset), {})
    if OUTPUTS not in row:
        raise ValueError(
            f"teacher='cached' needs a column {OUTPUTS!r}, which `precompute_teacher` adds to a "
            f"dataset; there are only {sorted(row)}. The dataset for evaluation needs it too."
        )
    return from_bytes(row[OUTPUTS]).origin


def _classes(config: Any, head: Head, origin: Origin) -> Classes | None:
    if origin.head != head.name:
        raise ValueError(
            f"The student's head is for {head.name}, the cached teacher's for {origin.head}."
        )
    same = tuple(getattr(config, name, None) for name in head.same)
    if same != origin.same:
        raise ValueError(
            f"The student's config has {same} as its {', '.join(head.same)}, the cached teacher's "
            f"{origin.same}: their outputs cannot be compared."
        )
    if origin.labels is not None:
        if config.num_labels != origin.classes:
            raise ValueError(
                f"The student's head has {config.num_labels} labels, the cached teacher's "
                f"{origin.classes}."
            )
        return label_classes(config.id2label, dict(enumerate(origin.labels)))
    size = vocabulary_size(config) if head.writes_text else None
    if size is None or origin.classes is None:
        return None
    if size < origin.classes or (size > origin.classes and not origin.cut):
        raise ValueError(
            f"The student's vocabulary has {size} entries, the cached teacher's {origin.classes}. "
            "Where one is only padded further, pass precompute_teacher(vocabulary=...) the number of "
            "tokens that both have."
        )
    return None
