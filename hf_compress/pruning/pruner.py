"""The sparsity constraint: a mask over a group of weights, re-ranked along a schedule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from hf_compress.constraint import Constraint, Member
from hf_compress.distributed import local
from hf_compress.pruning.scores import SCORES
from hf_compress.pruning.select import count_kept, keep_highest
from hf_compress.schedules import Schedule, Shape

Scope = Literal["global", "layer"]
INTERVAL = 10


class Pruner(Constraint):
    """Unstructured pruning of a group of weights, to be attached by `constrain`.

    sparsity: fraction in [0, 1) of the group's weights that are zero in the end, exactly.
    score: "obd", "taylor" or "magnitude" (see `hf_compress.pruning.scores`).
    scope: "global" ranks the group as one, "layer" prunes each weight to the same sparsity.
    schedule, start, end: see `hf_compress.schedules.Schedule`.
    interval: optimizer steps between two rankings; by default 10, less where the schedule is so short
        that it would have fewer than ten of them.
    decay: of the moving averages in the score, in [0, 1).
    min_keep: fraction in [0, 1] of each weight that a global ranking leaves in any case.

    Zeros that are there at the start count as pruned, and the sparsity never falls below theirs.
    The gradient of a pruned weight is masked, so its latent value waits and can come back when the
    ranking changes; once the schedule has ended the mask is fixed.

    Memory for each weight: a bool mask; until the schedule ends also a latent copy and, for scores
    of gradients, an average.

    In a loop of your own, tell it the time before each step: `pruner.at(step, max_steps)`, with the
    number of optimizer steps taken when this one is done.
    """

    order = 0

    def __init__(
        self,
        sparsity: float,
        *,
        score: str = "obd",
        scope: Scope = "global",
        schedule: str | Shape = "cubic",
        start: int | float = 0.0,
        end: int | float = 0.6,
        interval: int | None = None,
        decay: float = 0.9,
        min_keep: float = 0.01,
    ) -> None:
        check_sparsity(sparsity)
        if score not in SCORES:
            raise ValueError(f"`score` is {score!r}; allowed are {sorted(SCORES)}.")
        if scope not in get_args(Scope):
            raise ValueError(f"`scope` is {scope!r}; allowed are {list(get_args(Scope))}.")
        if interval is not None and (not isinstance(interval, int) or interval < 1):
            raise ValueError(f"`interval` is {interval!r}: pass a number of steps, 1 or more.")
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"`decay` is {decay!r}; it lies in [0, 1).")
        if not 0.0 <= min_keep <= 1.0:
            raise ValueError(f"`min_keep` is {min_keep!r}: it is a fraction in [0, 1].")
        self.schedule = Schedule(final=sparsity, shape=schedule, start=start, end=end)
        self.score = score
        self.scope = scope
        self.interval = interval
        self.decay = decay
        self.min_keep = min_keep
        self._step = self._max_steps = 0
        self.total = 0
        """Weights in the group."""
        self.pruned = 0
        """Weights of the group that are pruned now."""
        self.finished = False
        """Whether the schedule has ended and its target was reached: the mask is fixed."""
        self._floors: list[int] = []

    def at(self, step: int, max_steps: int) -> None:
        """The coming optimizer step is number `step` (from 1) of `max_steps`."""
        self._step, self._max_steps = step, max_steps

    @property
    def sparsity(self) -> float:
        """The fraction of the group that is pruned now."""
        return self.pruned / max(self.total, 1)

    @property
    def needs_latent(self) -> bool:
        return not self.finished

    def begin(self, members: Sequence[Member]) -> None:
        for member in members:
            if "mask" not in member:
                member["mask"] = member.param != 0
            elif member["mask"].dtype != torch.bool:
                member["mask"] = member["mask"] != 0
        self._floors = [
            _size(group) - sum(count_kept(member["mask"]) for member in group)
            for group in self._ranked_together(members)
        ]
        self.total = _size(members)
        self.pruned = sum(self._floors)
        self._freeze_if_finished(members)
        if SCORES[self.score].accumulate is not None and not self.finished:
            for member in members:
                if "average" not in member:
                    member["average"] = torch.zeros_like(member.param)

    def observe(self, members: Sequence[Member]) -> None:
        accumulate = SCORES[self.score].accumulate
        for member in members:
            grad = local(cast(Tensor, member.param.grad))
            if accumulate is not None and not self.finished:
                accumulate(local(member["average"]), local(member.latent), grad, self.decay)
            grad.mul_(local(member["mask"]))

    def update(self, members: Sequence[Member]) -> None:
        if self._max_steps == 0:
            raise RuntimeError(
                "tell the pruner the time before each step: `pruner.at(step, max_steps)`."
            )
        due = self._due(members)
        # Not only at the ranking steps: an fp16 overflow may have skipped one.
        if not self.finished and (self._step == self._last_ranking() or self.pruned != sum(due)):
            for group, pruned in zip(self._ranked_together(members), due, strict=True):
                self._rank(group, pruned)
            self.pruned = sum(due)
            self._freeze_if_finished(members)

    def project_(self, members: Sequence[Member]) -> None:
        for member in members:
            local(member.param).mul_(local(member["mask"]))

    def _ranked_together(self, members: Sequence[Member]) -> list[Sequence[Member]]:
        return [members] if self.scope == "global" else [[member] for member in members]

    def _due(self, members: Sequence[Member]) -> list[int]:
        """How many weights of each ranking are to be pruned since the last one."""
        sparsity = self.schedule.value(self._last_ranking(), self._max_steps)
        groups = zip(self._ranked_together(members), self._floors, strict=True)
        return [max(round(sparsity * _size(group)), floor) for group, floor in groups]

    def _last_ranking(self) -> int:
        """The latest step up to now at which a ranking is due."""
        start, end = self.schedule.span(self._max_steps)
        interval = self.interval or min(INTERVAL, max((end - start) // 10, 1))
        if self._step >= end:
            return end
        return self._step - max(self._step - start, 0) % interval

    def _rank(self, members: Sequence[Member], pruned: int) -> None:
        # The parameter holds the latent weight here.
        inputs = [
            (m.param.detach(), m["average"]) if "average" in m else (m.param.detach(),) for m in members
        ]
        masks = keep_highest(
            SCORES[self.score].formula,
            inputs,
            _size(members) - pruned,
            at_least=self.min_keep,
        )
        for member, mask in zip(members, masks, strict=True):
            member["mask"] = mask

    def _freeze_if_finished(self, members: Sequence[Member]) -> None:
        if self._max_steps == 0:  # nobody has told the time yet
            return
        _, end = self.schedule.span(self._max_steps)
        self.finished = self._step >= end and self.pruned == sum(self._due(members))
        if self.finished:
            for member in members:
                if "average" in member:
                    del member["average"]


def _size(members: Sequence[Member]) -> int:
    return sum(member.param.numel() for member in members)


def check_sparsity(sparsity: float) -> None:
    """Raises ValueError where `sparsity` is not a fraction in [0, 1)."""
    number = isinstance(sparsity, (int, float)) and not isinstance(sparsity, bool)
    if not number or not 0.0 <= sparsity < 1.0:
        raise ValueError(
            f"`sparsity` is {sparsity!r}: it is the fraction of weights that become zero, in [0, 1). "
            "For 80 % pass 0.8."
        )
