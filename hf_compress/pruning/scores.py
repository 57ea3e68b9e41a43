"""Scores: how much a weight is worth. The lowest are pruned.

A score is a formula of the weight and of a moving average of a statistic of its gradient. Formulas
are elementwise, so that selection can read them in pieces and never holds a score for the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Score:
    """`formula(weight, average)` ranks; `accumulate(average, weight, grad, decay)` is in place."""

    formula: Callable[..., Tensor]
    accumulate: Callable[[Tensor, Tensor, Tensor, float], object] | None
    paper: str


def magnitude(weight: Tensor) -> Tensor:
    """|w|. Good when there is much training after each pruning; collapses in short schedules."""
    return weight.abs()


def taylor(weight: Tensor, average: Tensor) -> Tensor:
    """Moving average of |w * grad|: the first-order change of the loss when w goes to zero."""
    return average


def obd(weight: Tensor, average: Tensor) -> Tensor:
    """w^2 times the moving average of grad^2: the second-order change, with the diagonal Fisher."""
    return weight.square() * average


def _accumulate_taylor(average: Tensor, weight: Tensor, grad: Tensor, decay: float) -> Tensor:
    return average.lerp_((weight * grad).abs_(), 1.0 - decay)


def _accumulate_fisher(average: Tensor, weight: Tensor, grad: Tensor, decay: float) -> Tensor:
    return average.mul_(decay).addcmul_(grad, grad, value=1.0 - decay)


SCORES = {
    "magnitude": Score(formula=magnitude, accumulate=None, paper="arXiv:1506.02626"),
    "taylor": Score(formula=taylor, accumulate=_accumulate_taylor, paper="arXiv:1611.06440"),
    "obd": Score(formula=obd, accumulate=_accumulate_fisher, paper="arXiv:2203.07259"),
}
