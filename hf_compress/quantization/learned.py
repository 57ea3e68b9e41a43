"""Learned scales: the gradient of the loss by the scale of a grid, and the step that follows it."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_compress.quantization.grids import Grid

# Decay of the mean and of the square. With these the first step is the rate itself, and no later one
# exceeds it by much, so that nothing has to count the steps.
MEAN, SQUARE = 0.9, 0.99


def scale_gradient(groups: Tensor, gradient: Tensor, grid: Grid) -> Tensor:
    """The gradient of the loss by the scales (LSQ, arXiv:1902.08153), one for each group.

    groups: latent weights w (..., members); gradient: of the loss by the weights that the model saw.
    The value s * round(w / s) changes with s by round(w / s) - w / s, as what rounding adds counts as a
    constant; a weight beyond the lowest or highest code q changes by q - z.
    """
    zero_point = torch.zeros_like(grid.scale) if grid.zero_point is None else grid.zero_point
    lowest = (grid.lowest - zero_point.float()).unsqueeze(-1)
    highest = (grid.highest - zero_point.float()).unsqueeze(-1)
    ratio = groups.float() * (1.0 / grid.scale.float()).unsqueeze(-1)
    beyond = (ratio < lowest) | (ratio > highest)
    change = ratio.clamp(lowest, highest).round_().sub_(ratio.masked_fill_(beyond, 0))
    return change.mul_(gradient).sum(-1)


def learn_scale_(scale: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, rate: float) -> None:
    """One step of Adam on the logarithm of `scale`, in place, its moments too.

    `rate` is the relative change of the scale. By the logarithm it keeps its sign, and neither its size
    nor the number of members matters: the paper's factor 1 / sqrt(members * highest code), which makes
    up for them under plain SGD, would cancel here.
    """
    by_logarithm = gradient * scale
    mean.lerp_(by_logarithm, 1 - MEAN)
    square.lerp_(by_logarithm.square(), 1 - SQUARE)
    # A group without a gradient, such as one that is pruned, stays where it is.
    tiny = torch.finfo(square.dtype).smallest_normal
    scale.mul_(torch.exp_(-rate * mean / square.sqrt().clamp_(min=tiny)))
