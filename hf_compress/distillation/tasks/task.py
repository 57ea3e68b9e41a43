"""What a task is: from the outputs of student and teachers to totals over the items of a batch.

An *item* is what the loss of a head is a mean over: a row for single-label classification, a
(row, label) pair for multi-label, a target for regression, a labelled token for language models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from hf_compress.distillation.divergences import Divergence

Batch = Mapping[str, Tensor]


class Sums(NamedTuple):
    """Totals over the items of one batch: divide by `items` for the means.

    Each is a scalar, or (parts,) where the loss is the mean of the means of several parts, which need
    not have equally many items (start and end of an answer).
    """

    items: Tensor
    task: Tensor
    distillation: Tensor
    agreement: Tensor


class Task(Protocol):
    """How one head turns a batch into items, and what an item costs.

    agreement: whether it means something that both models choose the same.
    """

    @property
    def name(self) -> str: ...

    @property
    def agreement(self) -> bool: ...

    def count(self, batch: Batch) -> Tensor:
        """The number of items in `batch`, shaped as `Sums.items`, without running a model."""
        ...

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
        """Totals over the items of the first `rows` rows (None: all), given the models' outputs.

        weights: of the teachers, which add up to 1. What does not count is dropped before any
        arithmetic, so that NaN there reaches neither the value nor the gradient. Without any item all
        totals are 0, still connected to the graph.
        """
        ...
