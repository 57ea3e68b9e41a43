"""Wanda: a weight is worth its magnitude times the norm of the input that it multiplies.

Sun et al. 2023, arXiv:2306.11695.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_compress.pruning.patterns import keep_n_of_m


def wanda_mask(
    weight: Tensor,
    norms: Tensor,
    *,
    sparsity: float,
    n_of_m: tuple[int, int] | None = None,
) -> Tensor:
    """Bool mask of the weights to keep: those of the highest |w_ij| * norms_j, each row for itself.

    weight: (out, in). norms: (in,), the L2 norm of each input feature over the calibration data.
    sparsity: fraction in [0, 1) that is pruned of each row: exactly round(sparsity * in).
    n_of_m: (n, m) keeps the n best of each m neighbours instead, and `sparsity` is not read.
    """
    score = weight.abs() * norms
    if n_of_m is not None:
        return keep_n_of_m(score, *n_of_m)
    pruned = round(sparsity * weight.shape[1])
    lowest = score.topk(pruned, dim=1, largest=False, sorted=False).indices
    return torch.ones_like(weight, dtype=torch.bool).scatter_(1, lowest, False)


def add_squares(total: Tensor | None, inputs: Tensor) -> Tensor:
    """Adds inputs (positions, in) to the sum of their squares (in,), in place."""
    squares = inputs.square().sum(0)
    return squares if total is None else total.add_(squares)
