"""The loss of the outputs: the task's own and the distance from the teachers, over counted items."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn

from hf_compress.distillation.cache.cells import OUTPUTS, STATES
from hf_compress.distillation.chunking import Chunking
from hf_compress.distillation.divergences import Divergence
from hf_compress.distillation.routing import ROUTES
from hf_compress.distillation.tasks.heads import Head
from hf_compress.distillation.tasks.task import Sums, Task
from hf_compress.distillation.teachers import Teacher
from hf_compress.distillation.translation.collator import TRANSLATED
from hf_compress.targets import without_adapters


@dataclass(frozen=True)
class Prepared:
    """A batch before its forwards.

    asked: what the teachers are given; features: what the student is; in_chunks: whether its loss does
    without the logits.
    """

    asked: Mapping[str, Any]
    features: Mapping[str, Any]
    in_chunks: bool


class Objective:
    """What a student of this head learns from its labels and from its teachers.

    weights: of the teachers, which add up to 1; autocast: the precision in which they answer; task: in
    place of that of the head, None where there is no other.
    The first batch decides what a classifier is trained for, where its config does not say so.
    """

    def __init__(
        self,
        head: Head,
        teachers: Sequence[Teacher],
        weights: Sequence[float],
        autocast: Callable[[], AbstractContextManager],
        chunk_size: int | str | None = None,
        task: Task | None = None,
    ) -> None:
        self.head = head
        self.task = task
        self._teachers = tuple(teachers)
        self._weights = tuple(weights)
        self._autocast = autocast
        self._chunking = Chunking(teachers, weights, autocast, chunk_size)

    @property
    def agreement(self) -> bool:
        """Whether it means something that both models choose the same; not before the first batch."""
        return self.task is not None and self.task.agreement

    def items(self, model: nn.Module, batches: Sequence[Mapping[str, Any]], device: Any) -> Tensor:
        """The number of items in all of `batches`, shaped as `Sums.items`."""
        items = torch.zeros((), dtype=torch.long, device=device)
        for batch in batches:
            items = items + self._task_of(model, batch).count(batch).to(device)
        return items

    def prepare(self, model: nn.Module, batch: Mapping[str, Any], *, logits: bool = False) -> Prepared:
        """How `sums` will go about `batch`. The first time it may run the models, to see how they make
        their logits: so before anything is taken down in their forwards.

        logits: whether the student's are wanted whole.
        """
        task = self._task_of(model, batch)
        asked = self.head.inputs(_unwrapped(model), batch)
        features = _without_answers(asked)
        in_chunks = not logits and self._chunking.takes(model, features, task, batch)
        return Prepared(asked, features, in_chunks)

    def sums(
        self,
        model: nn.Module,
        batch: Mapping[str, Any],
        *,
        divergence: Divergence,
        alpha: float,
        rows: int | None = None,
        prepared: Prepared | None = None,
    ) -> tuple[Sums, Any]:
        """The totals over the first `rows` rows of `batch` (None: all), to be `mixed` by `alpha`, and
        the student's outputs, whose logits are of no position where they went in chunks.

        prepared: of this batch, where `prepare` had to be called before.
        Raises ValueError for a batch without labels, or with labels that do not fit the outputs.
        """
        given = self.prepare(model, batch) if prepared is None else prepared
        task = self._task_of(model, batch)
        if given.in_chunks:
            return self._chunking.sums(
                model,
                given.features,
                task,
                batch,
                asked=given.asked,
                divergence=divergence,
                alpha=alpha,
                rows=rows,
            )
        outputs = model(**given.features)
        with self._autocast():
            taught = [teacher(given.asked) for teacher in self._teachers]
        sums = task.sums(
            outputs, taught, batch, divergence=divergence, weights=self._weights, rows=rows
        )
        return sums, outputs

    def losses(
        self,
        model: nn.Module,
        batches: Sequence[Mapping[str, Any]],
        *,
        divergence: Divergence,
        alpha: float,
        device: torch.device,
    ) -> Iterator[Tensor]:
        """Of each of the batches of one optimizer step on this process, which add up to that of all.

        Raises ValueError where none has a label that counts.
        """
        items = self.items(model, batches, device)
        if not items.sum():
            raise ValueError("The rows have no label that counts: pass more `rows`.")
        for batch in batches:
            with self._autocast():
                sums, _ = self.sums(model, batch, divergence=divergence, alpha=alpha)
            yield mixed(sums, items.to(sums.items.device), alpha)

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
        name: value
        for name, value in features.items()
        if name not in (OUTPUTS, STATES, TRANSLATED, ROUTES)
    }
