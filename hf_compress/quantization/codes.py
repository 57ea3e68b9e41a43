"""The codes of a trained weight: what every file format of integers stores, with the scales."""

from __future__ import annotations

from torch import Tensor

from hf_compress.quantization.grids import Grid, GroupSize, dequantize, grouped, quantize


def codes_of(name: str, weight: Tensor, grid: Grid) -> Tensor:
    """The codes of `weight`, (out, in), as int8 of its shape.

    Raises ValueError where it is not on `grid`: nothing is rounded here.
    """
    groups = grouped(weight.contiguous(), input_dim=1, group_size=group_size_of(name, weight, grid))
    codes = quantize(groups, grid)
    if not dequantize(codes, grid).equal(groups):
        raise ValueError(
            f"{name} is not on its grid: something changed it after the training. Load the last "
            "checkpoint, which is, or train again."
        )
    return codes.view(weight.shape)


def group_size_of(name: str, weight: Tensor, grid: Grid) -> GroupSize:
    """How many inputs of `weight`, (out, in), share a scale.

    Raises ValueError for a grid of another weight.
    """
    (outputs, inputs), shape = weight.shape, tuple(grid.scale.shape)
    if shape == (1, 1):
        return "tensor"
    if len(shape) != 2 or shape[0] != outputs or inputs % shape[1]:
        raise ValueError(
            f"{name} is {outputs}x{inputs}, and its grid has scales of shape {shape}: pass the grids "
            "of this model's training."
        )
    return None if shape[1] == 1 else inputs // shape[1]
