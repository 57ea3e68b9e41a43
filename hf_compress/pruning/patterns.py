"""Patterns: which weights are kept or pruned together, and among which they compete."""

from __future__ import annotations

import torch
from torch import Tensor


def keep_n_of_m(score: Tensor, n: int, m: int) -> Tensor:
    """Bool mask that keeps the `n` highest of each `m` neighbours along the last dimension.

    score: (..., width), `width` a multiple of `m`. Of equal scores the earlier is kept.
    """
    groups = score.reshape(-1, m)
    kept = groups.argsort(dim=1, descending=True, stable=True)[:, :n]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, kept, True).reshape(score.shape)
