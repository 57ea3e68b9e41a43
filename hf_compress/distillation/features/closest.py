"""The student's layers that are closest to given ones of the teacher, chosen anew in each step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hf_compress.distillation.features.recorder import Feature


class Closest:
    """For each of the teacher's layers in `pairs` the closest of the student's `candidates`
    (papers/2204.00408): that of the least distance over the whole accumulated batch of the step
    before, on all processes, so that the choice does not depend on how a batch is cut either.

    In the first step the pairs are those given. Layers that pruning made useless fall out by
    themselves.
    """

    def __init__(
        self, pairs: list[tuple[Feature, Feature]], candidates: list[Feature], device: torch.device
    ) -> None:
        self._teacher = [theirs for _, theirs in pairs]
        self.candidates = candidates
        self.chosen = torch.tensor([candidates.index(ours) for ours, _ in pairs])
        self._distances = torch.zeros(len(pairs), len(candidates), device=device)

    @property
    def pairs(self) -> list[tuple[Feature, Feature]]:
        """(student's, teacher's) as they are now."""
        ours = [self.candidates[number] for number in self.chosen.tolist()]
        return list(zip(ours, self._teacher, strict=True))

    def observe(self, distances: Tensor) -> None:
        """Add the sums (pairs, candidates) over the items of one batch."""
        self._distances += distances

    def choose(self, summed: Callable[[Tensor], Tensor]) -> None:
        """At the end of an optimizer step. summed: over all processes."""
        distances = summed(self._distances)
        if distances.any():  # else its weight was 0
            self.chosen = distances.argmin(1).cpu()
        self._distances = torch.zeros_like(distances)
