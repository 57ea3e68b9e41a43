"""All matches of a training: counted, taken down, summed and logged. Knows nothing of the Trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_compress.distillation.features.items import count_items
from hf_compress.distillation.features.match import Match
from hf_compress.distillation.features.recorder import Recorder
from hf_compress.distillation.features.terms import resolve
from hf_compress.targets import without_adapters

Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over all processes."""


class FeatureMatching:
    """The matches between a student and its teacher, whose loss is normalised as that of the outputs.

    matches: what is compared; none is allowed, and costs nothing.
    weights: by the name of the match, which may be changed at any time; 0 leaves it out.

    In each optimizer step `count`; in each forward `start`, both models, `loss`; at the end `stop`.
    Raises ValueError where a match does not fit the models, or two have one name.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module, matches: Iterable[Match], device: torch.device
    ) -> None:
        self._teacher = without_adapters(teacher)
        self._matches = tuple(matches)
        self._student: nn.Module | None = None
        self._recorders: tuple[Recorder, ...] = ()
        self._resolve(student)
        names = [term.name for term in self._terms]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"several matches are called {repeated[0]!r}: give them a `name` each.")
        self.weights = {term.name: float(term.match.weight) for term in self._terms}
        self._device = device
        self._items = torch.zeros(len(self._terms), dtype=torch.long, device=device)
        self._totals = torch.zeros(2, len(self._terms), device=device)

    def _resolve(self, student: nn.Module) -> None:
        inner = without_adapters(student)
        self._terms = [term for match in self._matches for term in resolve(match, inner, self._teacher)]

    def __bool__(self) -> bool:
        return bool(self._matches)

    def count(self, batches: Sequence[Mapping[str, Any]], reduce: Reduce) -> None:
        """The items of one optimizer step, of which `batches` are what this process has."""
        if self._matches:
            self._items.zero_()
            for batch in batches:
                self._items += self._count(batch)
            self._items = reduce(self._items)

    def start(self, student: nn.Module) -> None:
        """The coming forwards of both models are taken down."""
        if not self._matches:
            return
        if self._student is not student:
            self.stop()
            self._resolve(student)
            pairs = [pair for term in self._terms for pair in term.pairs]
            self._student = student
            self._recorders = (
                Recorder(without_adapters(student), {ours for ours, _ in pairs}),
                Recorder(self._teacher, {theirs for _, theirs in pairs}),
            )
        for recorder in self._recorders:
            recorder.start()

    def loss(self, batch: Mapping[str, Any], processes: int) -> Tensor | float:
        """The weighted part of the loss of what was taken down: the sum over the items here divided by
        the number that was counted, times that of the processes, over which gradients are averaged."""
        if not self._matches:
            return 0.0
        student, teacher = (recorder.take() for recorder in self._recorders)
        self._totals[1] += self._count(batch)
        loss: Tensor | float = 0.0
        for number, (term, items) in enumerate(zip(self._terms, self._items, strict=True)):
            if weight := self.weights[term.name]:
                total = term.total(student, teacher, batch, {})
                self._totals[0, number] += total.detach()
                loss = loss + weight * total / (items.clamp(min=1) / processes)
        return loss

    def means(self, reduce: Reduce) -> dict[str, float]:
        """Of each match since `forget`, over all processes, as `loss_<name>`."""
        if not self._matches:
            return {}
        totals, counts = reduce(self._totals).tolist()
        return {
            f"loss_{term.name}": total / count
            for term, total, count in zip(self._terms, totals, counts, strict=True)
            if count > 0 and self.weights[term.name]
        }

    def forget(self) -> None:
        """The means begin anew."""
        self._totals = torch.zeros_like(self._totals)

    def stop(self) -> None:
        """Nothing is left on the models."""
        for recorder in self._recorders:
            recorder.remove()
        self._recorders = ()
        self._student = None

    def _count(self, batch: Mapping[str, Any]) -> Tensor:
        counts = [count_items(batch, term.stack, term.match.tokens) for term in self._terms]
        return torch.stack([torch.as_tensor(count, device=self._device) for count in counts])
