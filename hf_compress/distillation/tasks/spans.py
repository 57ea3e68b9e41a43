"""Question answering: where the answer starts and where it ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hf_compress.distillation.divergences import Divergence
from hf_compress.distillation.tasks.labelled import CLASS, IGNORED, Labelled
from hf_compress.distillation.tasks.task import Batch, Sums

POSITIONS = ("start_positions", "end_positions")


@dataclass(frozen=True, kw_only=True)
class Spans:
    """A `Task` of two parts, start and end, whose classes are the positions of the input.

    As in transformers a position behind the input is ignored, one before it is the first, and the loss
    is the mean of both parts. Padding is among the positions, as it is for the task's own loss.
    """

    name: str = "question answering"
    agreement: bool = True

    def count(self, batch: Batch) -> Tensor:
        return torch.stack([part.count(batch) for part in _PARTS])

    def sums(
        self,
        student: Any,
        teachers: Sequence[Any],
        batch: Batch,
        *,
        divergence: Divergence,
        weights: Sequence[float] = (1.0,),
        rows: int | None = None,
    ) -> Sums:
        for who, output in (("student", student), *(("teacher", teacher) for teacher in teachers)):
            positions = output.start_logits.shape[1]
            if positions != _length(batch):
                raise ValueError(
                    f"{self.name}: the {who} answers with {positions} positions to an input of "
                    f"{_length(batch)}. Models that add positions of their own (prompt tuning) are not "
                    "supported."
                )
        parts = [
            part.sums(student, teachers, batch, divergence=divergence, weights=weights, rows=rows)
            for part in _PARTS
        ]
        return Sums(*(torch.stack(values) for values in zip(*parts, strict=True)))


def _length(batch: Batch) -> int:
    return (batch["input_ids"] if "input_ids" in batch else batch["inputs_embeds"]).shape[1]


def _positions(batch: Batch, name: str) -> Tensor:
    positions = batch[name].reshape(-1)
    return positions.clamp(min=0).masked_fill(positions >= _length(batch), IGNORED)


_START = Labelled(
    name="question answering",
    logits=lambda output: output.start_logits,
    labels=lambda batch: _positions(batch, "start_positions"),
    answer=CLASS,
)
_END = replace(
    _START,
    logits=lambda output: output.end_logits,
    labels=lambda batch: _positions(batch, "end_positions"),
)
_PARTS = (_START, _END)
SPANS = Spans()
