"""The loss of the outputs: the task's own and the distance from the teachers, over counted items."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn

from hf_compress.distillation.cache.cells import OUTPUTS, STATES
from hf_compress.distillation.chunking import Chunking
from hf_compress.distillation.divergences import Divergence
from hf_compress.distillation.tasks.heads import Head
from hf_compress.distillation.tasks.task import Sums, Task
from hf_compress.distillation.teachers import Teacher
from hf_compress.distillation.translation.collator import TRANSLATED
from hf_compress.targets import without_adapters


class Objective:
    """What a student of this head learns from its labels and from its teachers.

    weights: of the teachers, which add up to 1; autocast: the precision in which they answer.
    The first batch decides what a classifier is trained for, where its config does not say so.
    """

    def __init__(
        self,
        head: Head,
        teachers: Sequence[Teacher],
        weights: Sequence[float],
        autocast: Callable[[], AbstractContextManager],
        chunk_size: int | str | None = None,
    ) -> None:
        self.head = head
        self.task: Task | None = None
        self._teachers = tuple(teachers)
        self._weights = tuple(weights)
        self._autocast = autocast
        self._chunking = Chunking(teachers, weights, autocast, chunk_size)

    def items(self, model: nn.Module, batches: Sequence[Mapping[str, Any]], device: Any) -> Tensor:
        """The number of items in all of `batches`, shaped as `Sums.items`."""
        items = torch.zeros((), dtype=torch.long, device=device)
        for batch in batches:
            items = items + self._task_of(model, batch).count(batch).to(device)
        return items

    def prepare(self, model: nn.Module, batch: Mapping[str, Any]) -> None:
        """Sees how the models make their logits, before anything is taken down in their forwards."""
        task = self._task_of(model, batch)
        features = _without_answers(self.head.inputs(_unwrapped(model), batch))
        self._chunking.takes(model, features, task, batch)

    def sums(
        self,
        model: nn.Module,
        batch: Mapping[str, Any],
        *,
        divergence: Divergence,
        alpha: float,
        rows: int | None = None,
        logits: bool = False,
    ) -> tuple[Sums, Any]:
        """The totals over the first `rows` rows of `batch` (None: all), to be `mixed` by `alpha`, and
        the student's outputs, which may lack the `logits` where these are not asked for.

        Raises ValueError for a batch without labels, or with labels that do not fit the outputs.
        """
        task = self._task_of(model, batch)
        asked = self.head.inputs(_unwrapped(model), batch)
        features = _without_answers(asked)
        if not logits and self._chunking.takes(model, features, task, batch):
            return self._chunking.sums(
                model, features, task, batch, divergence=divergence, alpha=alpha, rows=rows
            )
        outputs = model(**features)
        with self._autocast():
            taught = [teacher(asked) for teacher in self._teachers]
        sums = task.sums(
            outputs, taught, batch, divergence=divergence, weights=self._weights, rows=rows
        )
        return sums, outputs

    def _task_of(self, model: nn.Module, batch: Mapping[str, Any]) -> Task:
        if self.task is None:
            if missing := [name for name in self.head.labels if name not in batch]:
                raise ValueError(
                    f"The batch has no `{'`, no `'.join(missing)}`, only {sorted(batch)}. The task "
                    "part of the loss and the choice of items need them; see `remove_unused_columns` "
                    "and the collator."
                )
            self.task = self.head.task(_unwrapped(model), batch)
        return self.task


def mixed(sums: Sums, items: Tensor, alpha: float) -> Tensor:
    """(1 - alpha) task + alpha distillation, by `items`; of a head of several parts their mean."""
    # A part of weight 0 is left out, not multiplied by 0: it must not bring in NaN, or cost a backward.
    if alpha == 0:
        total = sums.task
    elif alpha == 1:
        total = sums.distillation
    else:
        total = (1 - alpha) * sums.task + alpha * sums.distillation
    return (total / items.clamp(min=1)).mean()


def _unwrapped(model: nn.Module) -> Any:
    return without_adapters(extract_model_from_parallel(model, keep_torch_compile=False))


def _without_answers(features: Mapping[str, Any]) -> dict[str, Any]:
    """What the student is given, where the batch brings something for the teacher alone."""
    return {
        name: value for name, value in features.items() if name not in (OUTPUTS, STATES, TRANSLATED)
    }
