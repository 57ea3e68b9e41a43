"""The codes of a trained weight: what every file format of integers stores, with the scales."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_compress.quantization.grids import Grid, GroupSize, dequantize, grouped, quantize


def codes_of(name: str, weight: Tensor, grid: Grid, *, input_dim: int) -> Tensor:
    """The codes of `weight` as int8 of its shape; its input features lie along `input_dim`.

    Raises ValueError where it is not on `grid`: nothing is rounded here.
    """
    weight = weight.contiguous()
    size = group_size_of(name, weight, grid, input_dim=input_dim)
    groups = grouped(weight, input_dim=input_dim, group_size=size)
    codes = quantize(groups, grid)
    if not dequantize(codes, grid).equal(groups):
        raise ValueError(
            f"{name} is not on its grid: something changed it after the training. Load the last "
            "checkpoint, which is, or train again."
        )
    whole = torch.empty_like(weight, dtype=torch.int8)
    grouped(whole, input_dim=input_dim, group_size=size).copy_(codes)
    return whole


def group_size_of(name: str, weight: Tensor, grid: Grid, *, input_dim: int) -> GroupSize:
    """How many inputs of `weight` share a scale.

    Raises ValueError for a grid of another weight.
    """
    shape = tuple(grid.scale.shape)
    if shape == (*weight.shape[:-2], 1, 1):
        return "tensor"
    inputs = weight.shape[input_dim]
    expected = list(weight.shape)
    expected[input_dim] = groups = shape[input_dim] if len(shape) == weight.dim() else 0
    if shape != tuple(expected) or not groups or inputs % groups:
        raise ValueError(
            f"{name} is {'x'.join(map(str, weight.shape))}, and its grid has scales of shape {shape}: "
            "pass the grids of this model's training."
        )
    return None if groups == 1 else inputs // groups
