"""Scores: how much a weight is worth. The lowest are pruned.

A score is a formula of the weight and of a statistic that is accumulated, step by step, from the
gradients or from the inputs of the layer. Formulas are elementwise, so that selection can read them
in pieces and never holds a score for the model; statistics have the shape of their weight.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from hf_compress.devices import host

# The multipliers of splitmix64, as the signed integers that torch computes with.
GOLDEN, MIX_1, MIX_2 = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15


@dataclass(frozen=True, kw_only=True)
class Score:
    """`formula(weight)`, or `formula(weight, statistic)` where there is one, ranks the weights.

    accumulate: `accumulate(statistic, latent, seen, decay)` changes the statistic in place before
        each step; it begins at zero. None where there is no statistic.
    sees: what `seen` is: the "gradient" of the weight as the model saw it (pruned ones included), or
        the mean square of the layer's "inputs", broadcast over the output features.
    noise: the formula's second argument is a number in [0, 1) drawn for each weight from this seed,
        its name and its place; no statistic then.
    """

    name: str
    paper: str
    formula: Callable[..., Tensor]
    accumulate: Callable[[Tensor, Tensor, Tensor, float], object] | None = None
    sees: Literal["gradient", "inputs"] = "gradient"
    noise: int | None = None


@dataclass(frozen=True)
class Noise:
    """Uniform numbers for the weights from place `first` on of the weight `name`: a pure function of
    `seed`, `name` and the place in the whole weight, hence the same however it is sharded."""

    seed: int
    name: str
    first: int
    device: torch.device = field(default_factory=host)

    def __getitem__(self, place: slice) -> Tensor:
        digest = hashlib.blake2b(f"{self.seed}:{self.name}".encode(), digest_size=8).digest()
        key = int.from_bytes(digest, "big", signed=True)
        z = torch.arange(self.first + place.start, self.first + place.stop, device=self.device)
        z = (z * GOLDEN).add_(key)  # int64 products wrap around: splitmix64
        z = (z ^ (z >> 30 & (1 << 34) - 1)).mul_(MIX_1)
        z = (z ^ (z >> 27 & (1 << 37) - 1)).mul_(MIX_2)
        return (z >> 40 & (1 << 24) - 1).float().div_(1 << 24)


def magnitude(weight: Tensor) -> Tensor:
    """|w|. Good when there is much training after each pruning; collapses in short schedules."""
    return weight.abs()


def taylor(weight: Tensor, average: Tensor) -> Tensor:
    """Moving average of |w * grad|: the first-order change of the loss when w goes to zero."""
    return average


def obd(weight: Tensor, average: Tensor) -> Tensor:
    """w^2 times the moving average of grad^2: the second-order change, with the diagonal Fisher."""
    return weight.square() * average


def wanda(weight: Tensor, average: Tensor) -> Tensor:
    """|w| times the root of the moving average of the mean squared input of its column."""
    return weight.abs() * average.sqrt()


def random(weight: Tensor, noise: Tensor) -> Tensor:
    """The baseline that any score has to beat."""
    return noise


def _accumulate_taylor(average: Tensor, weight: Tensor, grad: Tensor, decay: float) -> Tensor:
    return average.lerp_((weight * grad).abs_(), 1.0 - decay)


def _accumulate_fisher(average: Tensor, weight: Tensor, grad: Tensor, decay: float) -> Tensor:
    return average.mul_(decay).addcmul_(grad, grad, value=1.0 - decay)


def _accumulate_inputs(average: Tensor, weight: Tensor, squares: Tensor, decay: float) -> Tensor:
    return average.mul_(decay).add_(squares, alpha=1.0 - decay)


SCORES = {
    score.name: score
    for score in (
        Score(name="magnitude", paper="arXiv:1506.02626", formula=magnitude),
        Score(name="taylor", paper="arXiv:1611.06440", formula=taylor, accumulate=_accumulate_taylor),
        Score(name="obd", paper="arXiv:2203.07259", formula=obd, accumulate=_accumulate_fisher),
        Score(
            name="wanda",
            paper="arXiv:2306.11695",
            formula=wanda,
            accumulate=_accumulate_inputs,
            sees="inputs",
        ),
        # Uniform random pruning as a baseline: see "What is the State of Neural Network Pruning?".
        Score(name="random", paper="arXiv:2003.03033", formula=random, noise=0),
    )
}


def find_score(score: str | Score) -> Score:
    """The score of that name, or the one given. Raises ValueError for an unknown name."""
    if isinstance(score, Score):
        return score
    if not isinstance(score, str) or score not in SCORES:
        raise ValueError(
            f"`score` is {score!r}; allowed are {sorted(SCORES)}, or a `Score` of your own."
        )
    return SCORES[score]
