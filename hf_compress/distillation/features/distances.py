"""What one item costs: distances between vectors of a student and of its teacher.

As everywhere in distillation, one value for each item and never a mean over them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def mean_squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over the width of (student - teacher)^2 (papers/1909.10351). (..., width) -> (...)."""
    return (student - teacher).square().mean(-1)


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cosine of the angle between both, in [0, 2] (papers/1910.01108). (..., width) -> (...)."""
    return 1.0 - F.cosine_similarity(student, teacher, dim=-1)


def normalized_squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    """|student / |student| - teacher / |teacher||^2, in [0, 4] (papers/1908.09355), which is twice the
    cosine distance. (..., width) -> (...)."""
    return (F.normalize(student, dim=-1) - F.normalize(teacher, dim=-1)).square().sum(-1)


def relative_squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    """|student - teacher|^2 / |teacher|^2 (SquareHead, papers/2310.06927). (..., width) -> (...).

    The paper divides sums over all tokens of a batch. Here each token is divided by its own, so that
    neither the cut of a batch nor the few tokens of huge norm decide.
    """
    size = teacher.square().sum(-1).clamp(min=torch.finfo(teacher.dtype).eps)
    return (student - teacher).square().sum(-1) / size


DISTANCES = {
    "mse": mean_squared_error,
    "cosine": cosine_distance,
    "normalized": normalized_squared_error,
    "relative": relative_squared_error,
}
