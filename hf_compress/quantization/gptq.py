"""GPTQ: rounds column after column, and lets the columns that follow make up for the error.

Frantar et al. 2022, arXiv:2210.17323.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_compress.calibration.second_order import inverse_factor, sweep_
from hf_compress.quantization.grids import Grid, fake_quantize


def ordered_factor(gram: Tensor, *, damping: float = 0.01) -> tuple[Tensor, Tensor]:
    """The order of the columns, most used first (in,), and `inverse_factor` in that order (in, in).

    gram: (in, in), the sum of x x^T over the inputs x of the layer. All zero counts as the identity.
    """
    order = gram.diagonal().argsort(descending=True, stable=True)
    return order, inverse_factor(gram[order][:, order], damping=damping)


def gptq(weight: Tensor, order: Tensor, factor: Tensor, grid: Grid) -> Tensor:
    """The weight (out, in) on `grid`, rounded so that the layer's output stays near; zeros stay zeros.

    weight: (out, in), fp32. order, factor: from `ordered_factor`.
    grid: scales (out, groups), each for as many neighbouring columns; or (1, 1). It stays as it is: the
        paper fits each group's grid to its updated weights, which allows no other order of columns.
    """
    columns = weight.t()[order].contiguous()  # (in, out)
    zero = columns == 0
    grids = _by_group(grid)
    groups = (order // (len(order) // len(grids))).tolist()

    def rounded(j: int, rest: Tensor) -> Tensor:
        nearest = fake_quantize(rest[0].unsqueeze(1), grids[groups[j]]).squeeze(1)
        return nearest.masked_fill_(zero[j], 0)

    sweep_(columns, factor, rounded)
    result = torch.empty_like(weight)
    result[:, order] = columns.t()
    return result


def _by_group(grid: Grid) -> list[Grid]:
    """The grids of the groups (out, groups), each with scales (out,)."""
    scales = grid.scale.unbind(1)
    zero_points = [None] * len(scales) if grid.zero_point is None else grid.zero_point.unbind(1)
    return [
        Grid(scale=scale, zero_point=zero_point, bits=grid.bits)
        for scale, zero_point in zip(scales, zero_points, strict=True)
    ]
