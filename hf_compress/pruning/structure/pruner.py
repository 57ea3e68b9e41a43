"""The constraint that takes whole units along a schedule, until `shrink` can remove them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_compress.constraint import TimedConstraint
from hf_compress.member import Member
from hf_compress.pruning.masks import check_restored
from hf_compress.pruning.structure.anatomy import Units
from hf_compress.pruning.structure.choice import check_fraction, check_round_to, count_kept, highest
from hf_compress.pruning.structure.removal import alive, zero_
from hf_compress.schedules import Schedule, Shape


class UnitPruner(TimedConstraint):
    """Structured pruning of neurons or heads, to be attached by `constrain` to their `parameters`.

    units: what `hf_compress.pruning.structure.units.find_units` finds, of kind "ffn" or "heads".
    sparsity: fraction in [0, 1) of the units of each place that go; see `prune_structure` for what
        must be whole.
    schedule, start, end: see `hf_compress.schedules.Schedule`. By default it begins late enough for
        the averages to mean something.
    decay: of the moving average of |sum of w * grad| over the columns that read a unit (Molchanov et
        al., arXiv:1906.10771), in [0, 1).
    round_to: as many neurons stay as a multiple of it.

    Units that go are zeroed in all tensors, everywhere equally many, and do not come back: nothing
    would tell their worth, since a unit that neither reads nor writes has no gradient. Units that are
    zero at the start count as gone.

    Memory: two numbers for each unit; no latent weights and no masks of weights.

    In a loop of your own, tell it the time before each step: `pruner.at(step, max_steps)`, with the
    number of optimizer steps taken when this one is done. Then `shrink(model)`.

    Raises ValueError for settings out of range, a fraction that units cannot lose and frozen ones; when
    attached, for sharded parameters and for the optimizer of a checkpoint without its weights.
    """

    order = 0
    needs_latent = False

    def __init__(
        self,
        units: Sequence[Units],
        sparsity: float,
        *,
        schedule: str | Shape = "cubic",
        start: int | float = 0.1,
        end: int | float = 0.6,
        decay: float = 0.9,
        round_to: int = 1,
    ) -> None:
        for u in units:
            if u.kind not in ("ffn", "heads"):
                raise ValueError(
                    f"{u.kind} cannot be zeroed along a schedule, only ffn and heads: remove {u.kind} "
                    "before the training, with prune_structure."
                )
            check_fraction(u.kind, sparsity)
            if frozen := [piece.name for piece in u.slices if not piece.param.requires_grad]:
                raise ValueError(
                    f"{frozen[0]} is frozen, but a unit is trained as a whole: let it train "
                    "(`requires_grad_(True)`), or call prune_structure before the training."
                )
        check_round_to(round_to)
        if not isinstance(decay, int | float) or not 0.0 <= decay < 1.0:
            raise ValueError(f"`decay` is {decay!r}: it lies in [0, 1), such as 0.9.")
        self.units = list(units)
        self.schedule = Schedule(final=1.0, shape=schedule, start=start, end=end)
        self.decay = decay
        self._final = [u.count - count_kept(u, sparsity, round_to) for u in units]
        self._alive: list[Tensor] = []
        self._members: dict[str, Member] = {}

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """All that the units own a part of, by name."""
        return {piece.name: piece.param for u in self.units for piece in u.slices}

    @property
    def total(self) -> int:
        """The number of units."""
        return sum(u.count for u in self.units)

    @property
    def pruned(self) -> int:
        """The number of units that are gone now."""
        return sum(int((~living).sum()) for living in self._alive)

    @property
    def sparsity(self) -> float:
        """The fraction of the units that is gone now."""
        return self.pruned / max(self.total, 1)

    @property
    def begun(self) -> bool:
        return self.schedule.value(self._step, self._max_steps) > 0.0

    @property
    def finished(self) -> bool:
        """Whether as many are gone as asked, in every place."""
        return bool(self._alive) and self.pruned >= sum(self._final)

    def count(self) -> None:
        """See in the weights which units are gone, as when it begins: after others were loaded."""
        self._alive = [alive(u) for u in self.units]

    def begin(self, members: Sequence[Member]) -> None:
        for member in members:
            if isinstance(member.param, DTensor):
                raise ValueError(
                    f"{member.name} is sharded, and a unit must lie whole on one rank: train with DDP, "
                    "or call prune_structure before the training."
                )
        self.count()
        for u, living, final in zip(self.units, self._alive, self._final, strict=True):
            if int((~living).sum()) > final:
                raise ValueError(
                    f"{int((~living).sum())} {u.kind} of {u.name} are zero already, more than "
                    f"the {final} to be pruned: `shrink` the model first, or ask for more."
                )
        self._members = {member.name: member for member in members}
        for u, living in zip(self.units, self._alive, strict=True):
            member = self._keeper(u)
            if "unit_average" not in member:
                member["unit_average"] = torch.zeros(
                    u.count, dtype=member.param.dtype, device=member.param.device
                )
            if "unit_mask" in member:
                check_restored(u.name, int((living & (member["unit_mask"].cpu() == 0)).sum()))
            member["unit_mask"] = living.to(member.param.device)

    def observe(self, members: Sequence[Member]) -> None:
        trained = {member.name for member in members}
        for u in self.units:
            if not self.finished and trained.issuperset(piece.name for piece in u.reading):
                # Of the weights the model has, not of latent ones: only for those it is the derivative.
                sums = [p.by_unit(p.param * cast(Tensor, p.param.grad)) for p in u.reading]
                worth = torch.stack(sums).sum(0).abs()
                self._keeper(u)["unit_average"].lerp_(worth, 1.0 - self.decay)

    def update(self, members: Sequence[Member]) -> None:
        self._check_time()
        due = self.schedule.value(self._step, self._max_steps)
        for i, (u, final) in enumerate(zip(self.units, self._final, strict=True)):
            gone = round(due * final)
            if gone > int((~self._alive[i]).sum()):
                keeper = self._keeper(u)
                scores = keeper["unit_average"].float().cpu()
                if not scores.isfinite().all():
                    raise ValueError(
                        f"the gradients of {u.name} were not finite, so its {u.kind} cannot be ranked: "
                        "lower the learning rate, or clip the gradients."
                    )
                kept = highest(scores.masked_fill(~self._alive[i], -1.0), u.count - gone)
                self._alive[i] = torch.zeros(u.count, dtype=torch.bool).index_fill_(
                    0, torch.tensor(kept), True
                )
                keeper["unit_mask"].copy_(self._alive[i])

    def project_(self, members: Sequence[Member]) -> None:
        for u, living in zip(self.units, self._alive, strict=True):
            zero_(u, (~living).nonzero().flatten())

    def _keeper(self, units: Units) -> Member:
        """The parameter in whose state the numbers of `units` are."""
        return self._members[units.reading[0].name]
