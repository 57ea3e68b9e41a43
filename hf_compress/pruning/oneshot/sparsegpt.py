"""SparseGPT: prunes column after column, and lets the columns that follow make up for the error.

Frantar and Alistarh 2023, arXiv:2301.00774.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_compress.calibration.second_order import sweep_
from hf_compress.pruning.patterns import keep_n_of_m
from hf_compress.pruning.select import keep_highest


def sparsegpt(
    weight: Tensor,
    factor: Tensor,
    *,
    sparsity: float,
    n_of_m: tuple[int, int] | None = None,
    block_size: int = 128,
) -> Tensor:
    """The pruned weight (out, in), its kept entries updated so that the layer's output stays near.

    weight: (out, in), fp32. factor: (in, in), from `inverse_factor`.
    sparsity: fraction in [0, 1) that is pruned, exactly round(sparsity * weight.numel()) entries. In
        each block of columns those of the lowest w^2 / [H^-1]_jj, H over the columns from j on.
    n_of_m: (n, m) keeps the n best of each m neighbours instead, and `sparsity` is not read.
    block_size: columns among which entries compete; a multiple of m.
    """
    # Columns as rows: each step then reads and writes memory in one piece.
    columns = weight.t().clone(memory_format=torch.contiguous_format)  # (in, out)
    rows = columns.shape[1]
    scales = factor.diagonal()[:, None]  # (in, 1): the square root of [H^-1]_jj
    pruned = torch.zeros_like(columns, dtype=torch.bool)

    def without_the_lowest(j: int, rest: Tensor) -> Tensor:
        if n_of_m is not None:
            if j % n_of_m[1] == 0:
                group = slice(j, j + n_of_m[1])
                score = (rest[: n_of_m[1]] / scales[group]).abs_()
                pruned[group] = ~keep_n_of_m(score.t(), *n_of_m).t()
        elif j % block_size == 0:
            end = j + len(rest)
            count = round(sparsity * rows * end) - round(sparsity * rows * j)
            pruned[j:end] = _lowest(rest / scales[j:end], count)
        return rest[0].masked_fill(pruned[j], 0)

    sweep_(columns, factor, without_the_lowest, block_size=block_size)
    return columns.t()


def _lowest(score: Tensor, count: int) -> Tensor:
    """Bool mask of the `count` entries of the lowest |score|."""
    (kept,) = keep_highest(torch.abs, [(score,)], score.numel() - count)
    return ~kept
