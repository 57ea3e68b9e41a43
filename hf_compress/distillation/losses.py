"""What one item costs: distances between two distributions, given by logarithms of probabilities.

Every function returns one value per item and never a mean: how many items there are in the whole
accumulated batch, over all processes, is known in one place only, the trainer.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) (papers/1503.02531).

    student, teacher: (..., classes) logarithms of probabilities. Returns (...), >= 0 up to rounding.
    A class of teacher probability 0 costs nothing; one of student probability 0 alone, infinity.
    """
    probability = teacher.exp()
    # 0 * log(0) is 0 here, where floating point says NaN.
    surprise = (teacher - student).masked_fill(probability == 0, 0.0)
    return (probability * surprise).sum(-1)


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(student || teacher) (papers/2306.08543), shaped as in `forward_kl`. Where the teacher rules
    out a class that the student does not, it is infinite."""
    return forward_kl(teacher, student)


def symmetric_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Jeffreys' divergence, the sum of both KL, shaped as in `forward_kl`."""
    return forward_kl(student, teacher) + reverse_kl(student, teacher)


def generalized_jsd(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """beta KL(teacher || m) + (1 - beta) KL(student || m), m = beta teacher + (1 - beta) student
    (papers/2306.13649), shaped as in `forward_kl`.

    beta: in [0, 1]. Towards both ends it vanishes: divided by beta it tends to the forward KL at 0,
    divided by 1 - beta to the reverse KL at 1. At the ends themselves it is these two.
    """
    if beta == 0:
        return forward_kl(student, teacher)
    if beta == 1:
        return reverse_kl(student, teacher)
    mixed = mixture(teacher, student, beta)
    return beta * forward_kl(mixed, teacher) + (1 - beta) * forward_kl(mixed, student)


def skew_kl(student: Tensor, teacher: Tensor, skew: float) -> Tensor:
    """KL(teacher || skew teacher + (1 - skew) student) (papers/2402.03898), shaped as in `forward_kl`,
    which it is at skew 0. Never above log(1 / skew)."""
    return forward_kl(mixture(teacher, student, skew), teacher)


def skew_reverse_kl(student: Tensor, teacher: Tensor, skew: float) -> Tensor:
    """KL(student || skew student + (1 - skew) teacher) (papers/2402.03898), shaped as in `forward_kl`.
    At skew 0 the reverse KL; never above log(1 / skew)."""
    return forward_kl(mixture(student, teacher, skew), student)


def total_variation(student: Tensor, teacher: Tensor) -> Tensor:
    """Half the sum of |student - teacher| over the probabilities (papers/2307.15190), in [0, 1], shaped
    as in `forward_kl`."""
    return (student.exp() - teacher.exp()).abs().sum(-1) / 2


def squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    """(student - teacher)^2 of each item, for regression, in fp32 or better. (...) -> (...)."""
    return (precise(student) - precise(teacher)) ** 2


def precise(logits: Tensor) -> Tensor:
    """In fp32 or better."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def mixture(one: Tensor, other: Tensor, weight: float) -> Tensor:
    """log(weight exp(one) + (1 - weight) exp(other)), weight in [0, 1)."""
    if weight == 0:
        return other
    # Two times log(0) has no gradient, and log of the least number the right one, 0.
    least = torch.finfo(one.dtype).min
    one, other = one.clamp(min=least), other.clamp(min=least)
    return torch.logaddexp(one + math.log(weight), other + math.log1p(-weight))
