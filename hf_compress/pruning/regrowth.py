"""RigL: a mask of fixed sparsity that moves to where the gradient is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from hf_compress.distributed import local
from hf_compress.member import Member
from hf_compress.pruning.masks import ZeroKeeper, check_sparsity
from hf_compress.pruning.scores import magnitude
from hf_compress.pruning.select import count_kept, keep_highest
from hf_compress.schedules import as_step, check_interval, check_time


class RigL(ZeroKeeper):
    """Sparse training from the first step on (arXiv:1911.11134), to be attached by `constrain`.

    sparsity: fraction in [0, 1) of each weight that is zero, from the beginning: the smallest are
        pruned when it is attached, and zeros that are there stay. Give layers sparsities of their own,
        such as those of ERK, by one `RigL` each.
    fraction: in (0, 1], the part of the active weights that the first exchange replaces; it falls to
        zero along half a cosine until `end`.
    interval: optimizer steps between two exchanges.
    end: the last exchange comes before this optimizer step (int), or fraction of the training (float).

    An exchange drops the smallest active weights, then activates as many of the inactive with the
    largest gradient, those just dropped included: they go on as they were. The others begin at zero, as
    does their momentum (but for what an optimizer keeps in 8 bit). The paper takes no optimizer step
    then; here the exchange comes before the step, in which what was grown is trained already. The
    choice is by the gradient of one step: large batches choose better.

    Memory for each weight: a bool mask. In a loop of your own, tell it the time before each step:
    `rigl.at(step, max_steps)`.

    Raises ValueError for settings out of range, and when attached to weights that are sparser already
    or for a training too short for one exchange.
    """

    def __init__(
        self,
        sparsity: float,
        *,
        fraction: float = 0.3,
        interval: int = 100,
        end: int | float = 0.75,
    ) -> None:
        super().__init__()
        check_sparsity(sparsity)
        if not isinstance(fraction, int | float) or not 0.0 < fraction <= 1.0:
            raise ValueError(
                f"`fraction` is {fraction!r}: the part to exchange lies in (0, 1], such as 0.3."
            )
        check_interval(interval)
        check_time("end", end)
        self._sparsity = sparsity
        self.fraction = fraction
        self.interval = interval
        self.end = end

    def fractions(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, float]:
        return dict.fromkeys(parameters, self._sparsity)

    def begin(self, members: Sequence[Member]) -> None:
        self._check_that_some_exchange_comes()
        fresh = [member for member in members if "mask" not in member]
        super().begin(members)
        for member in fresh:
            kept = member.param.numel() - round(self._sparsity * member.param.numel())
            if count_kept(member["mask"]) < kept:
                raise ValueError(
                    f"{member.name} is sparser than {self._sparsity} already: pass the sparsity it "
                    "has, or more."
                )
            self.pruned += count_kept(member["mask"]) - kept
            (member["mask"],) = keep_highest(magnitude, [(member.latent.detach(),)], kept)

    def observe(self, members: Sequence[Member]) -> None:
        part = self._exchanged()
        if part > 0:
            for member in members:
                _exchange(member, part)
        super().observe(members)

    def _check_that_some_exchange_comes(self) -> None:
        last = as_step(self.end, self._max_steps) - 1
        if self._max_steps > 0 and self.interval > last:
            raise ValueError(
                f"`interval` is {self.interval}, but the last exchange can come at step {last} of "
                f"{self._max_steps}, so the zeros would never move: pass a shorter `interval`, or "
                "train longer."
            )

    def _exchanged(self) -> float:
        """The part of the active weights to exchange before this step."""
        self._check_time()
        end = as_step(self.end, self._max_steps)
        if self._step % self.interval or self._step >= end:
            return 0.0
        return self.fraction / 2 * (1 + math.cos(math.pi * self._step / end))


def _exchange(member: Member, part: float) -> None:
    mask, weight = member["mask"], member.param.detach()
    active = count_kept(mask)
    count = min(round(part * active), weight.numel() - active)
    if count == 0:
        return
    # Any number below all magnitudes puts what must not be chosen last.
    (kept,) = keep_highest(
        lambda w, m: torch.where(m > 0, w.abs(), -1.0), [(weight, mask)], active - count
    )
    (grown,) = keep_highest(
        lambda g, k: torch.where(k > 0, -1.0, g.abs()), [(cast(Tensor, member.param.grad), kept)], count
    )
    anew = local(grown) & ~local(mask)
    for momentum in member.momenta:
        local(momentum).masked_fill_(anew, 0)
    # Where another constraint keeps a latent weight, what is grown must begin at zero there too.
    local(member.latent).mul_(local(mask))
    member["mask"] = kept.logical_or_(grown)
