"""The teacher that is not there: its answers come with the batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCTC

from hf_compress.distillation.alignment import Classes, label_classes
from hf_compress.distillation.cache.answers import restored
from hf_compress.distillation.cache.cells import OUTPUTS, STATES, Origin, from_bytes
from hf_compress.distillation.cache.collator import CachedCollator
from hf_compress.distillation.cache.states import KeptStates, skeleton_of
from hf_compress.distillation.tasks.heads import Head, head_of
from hf_compress.distillation.teacher import vocabulary_size
from hf_compress.distillation.teachers import Teaching
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
    student: nn.Module,
    datasets: Iterable[Any],
    collate: Any,
    *,
    bits: int | str | None,
    inside: bool,
) -> Teaching:
    """By a teacher whose answers all `datasets` bring along, and `collate` then too.

    inside: whether what happened in it is wanted too. Some datasets may be None, or several by name.
    Raises ValueError where there are none, where they do not fit, and for `bits`.
    """
    if bits is not None:
        raise ValueError(
            f"teacher='cached' is as precise as it was when it was asked: leave out `teacher_bits` "
            f"({bits}), and pass precompute_teacher(bits=...)."
        )
    parts: list[Any] = []
    for each in datasets:
        parts += each.values() if isinstance(each, dict) else [each]
    rows: list[dict[str, Any]] = [next(iter(part), {}) for part in parts if part is not None]
    origins = {OUTPUTS: _common(OUTPUTS, [_origin(row, OUTPUTS) for row in rows])}
    states = None
    if inside:
        # Evaluation compares the outputs only.
        origins[STATES] = _origin(rows[0], STATES)
        states = KeptStates(from_bytes(rows[0][STATES]).answers)
        made = {(origin.teacher, origin.precision) for origin in origins.values()}
        if len(made) > 1:
            raise ValueError(
                f"The outputs and the states were kept of different teachers (fingerprint, precision): "
                f"{sorted(made)}. Use `precompute_teacher` with the same for both."
            )
    inner: Any = without_adapters(student)
    return Teaching(
        asked=[CachedTeacher(student, head_of(student), origins[OUTPUTS])],
        collator=CachedCollator(collate, origins, inner.main_input_name),
        inside=skeleton_of(origins[STATES]) if inside else None,
        states=states,
        origin=origins[OUTPUTS],
    )


def origin_of(dataset: Any) -> Origin:
    """Of the outputs in the first row of `dataset`. Raises ValueError where there are none."""
    return _origin(next(iter(dataset), {}), OUTPUTS)


def _common(column: str, origins: list[Origin]) -> Origin:
    if len(set(origins)) != 1:
        raise ValueError(
            f"teacher='cached' needs datasets whose {column!r} are of one teacher, kept in one way, "
            f"but there are {origins or 'no datasets'}. Use `precompute_teacher` on all of them, with "
            "the same settings."
        )
    return origins[0]


def _origin(row: Mapping[str, Any], column: str) -> Origin:
    if column not in row:
        what = "" if column == OUTPUTS else " with what='hidden' or 'pooled'"
        raise ValueError(
            f"teacher='cached' needs a column {column!r}, which `precompute_teacher`{what} adds to a "
            f"dataset; there are only {sorted(row)}. The dataset for evaluation needs outputs too."
        )
    return Origin.from_json(from_bytes(row[column]).origin)


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
