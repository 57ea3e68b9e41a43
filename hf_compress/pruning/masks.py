"""Masks on weights: the constraint that keeps zeros, on which those that choose them are built."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from hf_compress.constraint import TimedConstraint, check_loaded
from hf_compress.distributed import local
from hf_compress.member import Member
from hf_compress.pruning.patterns import Pattern
from hf_compress.pruning.select import count_kept, total


class ZeroKeeper(TimedConstraint):
    """What is zero stays zero, and everything else is trained.

    Gradients of pruned weights are masked before the step, and the weights after it. Memory for each
    weight: a bool mask.

    Raises ValueError when it is attached to the optimizer of a checkpoint without its weights.
    """

    order = 0

    def __init__(self) -> None:
        self.total = 0
        """Weights in the group."""
        self.pruned = 0
        """Weights of the group that are pruned now."""

    @property
    def sparsity(self) -> float:
        """The fraction of the group that is pruned now."""
        return self.pruned / max(self.total, 1)

    @property
    def finished(self) -> bool:
        """Whether the group is as sparse as asked."""
        return True

    @property
    def due(self) -> int:
        """Weights of the group that are zero when training has ended."""
        return self.pruned

    def fractions(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, float]:
        """What part of each of `parameters` (by name) will be zero in the end."""
        return {name: 1 - count_kept(p != 0) / p.numel() for name, p in parameters.items()}

    @property
    def needs_latent(self) -> bool:
        return False

    def begin(self, members: Sequence[Member]) -> None:
        for member in members:
            if "mask" not in member:
                # Not the parameter, which another constraint may have rounded to zero.
                member["mask"] = member.latent != 0
                continue
            if member["mask"].dtype != torch.bool:
                member["mask"] = member["mask"] != 0
            # What keeps more of it, as a grid does, has also changed the weight, and checks it itself.
            ours = member.keys() <= {"latent", "mask", "statistic"}
            weight, mask = local(member.param), local(member["mask"])
            known = local(member.latent) if ours else weight
            astray = (weight != known.masked_fill(~mask, 0)).sum()
            check_restored(member.name, total(int(astray), member.param))
        self.total = size_of(members)
        self.pruned = self.total - sum(count_kept(member["mask"]) for member in members)

    def observe(self, members: Sequence[Member]) -> None:
        for member in members:
            local(cast(Tensor, member.param.grad)).mul_(local(member["mask"]))

    def update(self, members: Sequence[Member]) -> None:
        pass

    def project_(self, members: Sequence[Member]) -> None:
        for member in members:
            local(member.param).mul_(local(member["mask"]))


def check_restored(name: str, astray: int) -> None:
    """Raises ValueError where `name` has something `astray`: not what the optimizer's state tells."""
    check_loaded(name, astray, "as the checkpoint's optimizer tells")


def size_of(members: Sequence[Member]) -> int:
    """Weights of `members` together."""
    return sum(member.param.numel() for member in members)


def check_sparsity(sparsity: float) -> None:
    """Raises ValueError where `sparsity` is not a fraction in [0, 1)."""
    number = isinstance(sparsity, (int, float)) and not isinstance(sparsity, bool)
    if not number or not 0.0 <= sparsity < 1.0:
        raise ValueError(
            f"`sparsity` is {sparsity!r}: it is the fraction of weights that become zero, in [0, 1). "
            "For 80 % pass 0.8."
        )


def check_fractions(sparsity: Mapping[str, float], targets: object) -> None:
    """Raises ValueError where `sparsity` does not say the fraction of each target, or `targets` names
    them a second time."""
    if targets is not None:
        raise ValueError("`sparsity` as a dict names the targets: leave `targets` out.")
    if not sparsity:
        raise ValueError("`sparsity` is an empty dict: give a fraction for each target.")
    for fraction in sparsity.values():
        check_sparsity(fraction)


def sparsity_of(pattern: Pattern, sparsity: float | None) -> float:
    """The sparsity that is asked for, or that an N:M pattern means: 1 - N / M.

    Raises ValueError where neither says it, or both say different things.
    """
    if pattern.group is None or pattern.kept is None:
        if sparsity is None:
            raise ValueError("give `sparsity`: the fraction of weights that become zero, such as 0.8.")
        check_sparsity(sparsity)
        return sparsity
    implied = 1 - pattern.kept / pattern.group
    if sparsity is not None:
        check_sparsity(sparsity)
        if not math.isclose(sparsity, implied):
            raise ValueError(
                f"`sparsity` is {sparsity}, but pattern {pattern.name!r} means {implied:.6g}: leave "
                "`sparsity` out."
            )
    return implied
