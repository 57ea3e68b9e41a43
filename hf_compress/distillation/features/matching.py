"""All matches of a training: counted, taken down, summed and logged. Knows nothing of the Trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from hf_compress.distillation.cache.states import KeptStates
from hf_compress.distillation.features.closest import Closest
from hf_compress.distillation.features.items import count_items
from hf_compress.distillation.features.match import Match
from hf_compress.distillation.features.projections import Projections
from hf_compress.distillation.features.recorder import Recorder
from hf_compress.distillation.features.resolve import resolve
from hf_compress.distillation.features.terms import Values
from hf_compress.targets import without_adapters

FILE = "feature_matching.safetensors"

Reduce = Callable[[Tensor], Tensor]
"""A tensor summed, or averaged, over all processes."""


class FeatureMatching:
    """The matches between a student and its teacher, whose loss is normalised as that of the outputs.

    matches: what is compared; none is allowed, and costs nothing.
    kept: what was taken down of the teacher before and comes with the batches; `teacher` then only says
        where in a model that was, and needs no weights.
    weights: by the name of the match, which may be changed between steps; 0 leaves it out.

    In each optimizer step `count`; in each forward `start`, both models, `loss`; after the last
    backward `end_step`; at the end of all `stop`.
    Raises ValueError where a match does not fit the models, or two have one name.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        matches: Iterable[Match],
        *,
        device: torch.device,
        seed: int = 0,
        kept: KeptStates | None = None,
    ) -> None:
        inner, self._teacher = without_adapters(student), without_adapters(teacher)
        self._terms = [term for match in matches for term in resolve(match, inner, self._teacher)]
        names = [term.name for term in self._terms]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"several matches are called {repeated[0]!r}: give them a `name` each.")
        self._kept = kept
        if kept is not None:
            kept.check(theirs for term in self._terms for _, theirs in term.pairs)
        self.weights = {term.name: float(term.match.weight) for term in self._terms}
        self.projections = Projections(self._terms, device, seed)
        self._closest = {
            term.name: Closest(list(term.pairs), list(term.candidates), device)
            for term in self._terms
            if term.candidates
        }
        self._student: nn.Module | None = None
        self._recorders: tuple[Recorder, ...] = ()
        self._device = device
        self._items = torch.zeros(len(self._terms), dtype=torch.long, device=device)
        self._totals = torch.zeros(2, len(self._terms), device=device)

    def join(self, optimizer: Optimizer) -> None:
        """Let `optimizer` train the projections too."""
        self.projections.join(optimizer)

    def count(self, batches: Sequence[Mapping[str, Any]], summed: Reduce) -> None:
        """An optimizer step begins, of whose items `batches` are what this process has."""
        if self._terms:
            self.projections.zero_gradients_()
            self._items = summed(sum((self._count(batch) for batch in batches), 0 * self._items))

    def start(self, student: nn.Module) -> None:
        """The coming forward of both models is taken down."""
        if not self._terms:
            return
        if self._student is not student:
            self.stop()
            pairs = [pair for term in self._terms for pair in term.pairs]
            ours = {feature for term in self._terms for feature in term.candidates}
            watched = [(without_adapters(student), ours | {ours for ours, _ in pairs})]
            if self._kept is None:
                watched.append((self._teacher, {theirs for _, theirs in pairs}))
            self._recorders = tuple(Recorder(model, features) for model, features in watched)
            self._student = student
        for recorder in self._recorders:
            recorder.start()

    def loss(self, batch: Mapping[str, Any], processes: int) -> Tensor | float:
        """The weighted part of the loss of what was taken down: the sum over the items here divided by
        the number that was counted, times that of the processes, over which gradients are averaged."""
        if not self._terms:
            return 0.0
        learner, *example = self._recorders
        student = learner.take(learns=torch.is_grad_enabled())
        teacher: Values = (
            self._kept.take(batch) if self._kept is not None else example[0].take(learns=False)
        )
        counts = self._count(batch)
        loss: Tensor | float = 0.0
        for number, (term, items) in enumerate(zip(self._terms, self._items, strict=True)):
            weight = self.weights[term.name]
            if weight == 0:
                continue
            compared = student, teacher, batch, self.projections.weights
            closest = self._closest.get(term.name)
            if closest is not None:
                closest.observe(term.distances(*compared))
            total = term.total(*compared, closest.pairs if closest is not None else None)
            self._totals[0, number] += total.detach()
            self._totals[1, number] += counts[number]
            loss = loss + weight * total / (items.clamp(min=1) / processes)
        return loss

    def end_step(self, summed: Reduce, mean: Reduce) -> None:
        """All gradients of an optimizer step are there."""
        self.projections.average_gradients_(mean)
        for closest in self._closest.values():
            closest.choose(summed)

    def means(self, summed: Reduce) -> dict[str, float]:
        """Of each match since `forget`, over all processes, as `loss_<name>`."""
        if not self._terms:
            return {}
        totals, counts = summed(self._totals).tolist()
        return {
            f"loss_{term.name}": total / count
            for term, total, count in zip(self._terms, totals, counts, strict=True)
            if count > 0
        }

    def forget(self) -> None:
        """The means begin anew."""
        self._totals = torch.zeros_like(self._totals)

    def save(self, folder: str | Path) -> None:
        """What training must go on from, if anything, to a file in `folder`."""
        if state := self._state():
            save_file(state, Path(folder) / FILE)

    @torch.no_grad()
    def load(self, folder: str | Path) -> None:
        """Go on from what was saved. Raises ValueError where that was with other matches."""
        expected = self._state()
        if not expected:
            return
        path = Path(folder) / FILE
        found = load_file(path) if path.exists() else {}
        if {name: value.shape for name, value in found.items()} != {
            name: value.shape for name, value in expected.items()
        }:
            raise ValueError(
                f"{path} should hold {sorted(expected)}, but holds {sorted(found) or 'nothing'}: "
                "resume with the matches that the checkpoint was trained with."
            )
        for name, weight in self.projections.weights.items():
            weight.copy_(found[name])
        for name, closest in self._closest.items():
            closest.chosen = found[f"closest.{name}"]

    def stop(self) -> None:
        """Nothing is left on the models."""
        for recorder in self._recorders:
            recorder.remove()
        self._recorders = ()
        self._student = None

    def _state(self) -> dict[str, Tensor]:
        chosen = {f"closest.{name}": closest.chosen for name, closest in self._closest.items()}
        return {name: value.detach() for name, value in self.projections.weights.items()} | chosen

    def _count(self, batch: Mapping[str, Any]) -> Tensor:
        counts = [count_items(batch, term.stack, term.match.tokens) for term in self._terms]
        return torch.stack([torch.as_tensor(count, device=self._device) for count in counts])
