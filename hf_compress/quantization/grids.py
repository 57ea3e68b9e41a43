"""Integer grids: rounding weights to one, and back.

A group of weights shares a scale s and an integer zero point z; its grid is the values s * (q - z) of
the codes q of `bits` bits, from -2**(bits - 1) to 2**(bits - 1) - 1. The zero point is a code too, so
that zero is always on the grid and what is pruned stays zero.

Everything is computed in float32, and the scale has the dtype of the weight: files and optimizer
checkpoints keep it in that dtype, and would change any other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hf_compress.distributed import local, sum_over_shards

GroupSize = int | Literal["tensor"] | None


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The grids of the groups of a weight.

    scale: one number for each group, not 0; zero_point: one code for each group, as a float; None where
    all are 0. Both have the shape of the weight with its input dimension divided by the members of a
    group, or all 1 in the last two dimensions for one group in each matrix.
    """

    scale: Tensor
    zero_point: Tensor | None
    bits: int

    @property
    def lowest(self) -> int:
        """The lowest code."""
        return -(2 ** (self.bits - 1))

    @property
    def highest(self) -> int:
        """The highest code."""
        return 2 ** (self.bits - 1) - 1


def grouped(weight: Tensor, *, input_dim: int, group_size: GroupSize) -> Tensor:
    """View of `weight` as (*groups, members), the groups in the order of its dimensions.

    (out, in) becomes (out, in / size, size), Conv1D's (in, out) becomes (in / size, out, size), and
    experts keep their first dimension. `group_size` divides the inputs: see `check_divides`.
    """
    if group_size == "tensor":
        return weight.view(*weight.shape[:-2], 1, 1, weight.shape[-2] * weight.shape[-1])
    dim = input_dim % weight.dim()
    size = group_size or weight.shape[dim]
    return weight.unflatten(dim, (weight.shape[dim] // size, size)).movedim(dim + 1, -1)


def check_bits(setting: str, bits: object) -> None:
    """Raises ValueError where `bits` is not a whole number from 2 to 8."""
    if type(bits) is not int or not 2 <= bits <= 8:
        raise ValueError(f"`{setting}` is {bits!r}: pass a whole number of bits from 2 to 8.")


def scale_shape(weight: Tensor, *, input_dim: int, group_size: GroupSize) -> torch.Size:
    """The shape of the scales of `weight`, of a sharded one as a whole: one for each group."""
    whole = torch.empty(weight.shape, device="meta")
    return grouped(whole, input_dim=input_dim, group_size=group_size).shape[:-1]


def check_divides(name: str, weight: Tensor, *, input_dim: int, group_size: GroupSize) -> None:
    """Raises ValueError where `group_size` does not divide the input features of `weight`."""
    inputs = weight.shape[input_dim]
    if isinstance(group_size, int) and inputs % group_size:
        sizes = [size for size in range(2, inputs + 1) if inputs % size == 0]
        near = sorted(sorted(sizes, key=lambda size: abs(size - group_size))[:4])
        raise ValueError(
            f"`group_size` {group_size} does not divide the {inputs} input features of {name}: "
            f"{', '.join(map(str, near))} do. Or leave it out by `ignore`."
        )


def check_finite(name: str, weight: Tensor) -> None:
    """Raises ValueError where `weight` is not finite: it has no grid."""
    bad = local(weight).isfinite().logical_not_().sum()
    if sum_over_shards([(bad, weight)]) > 0:
        raise ValueError(
            f"{name} holds weights that are not finite, which lie on no grid: load a model without."
        )


def quantize(groups: Tensor, grid: Grid) -> Tensor:
    """The nearest codes of the weights (..., members), as int8."""
    return _codes(groups, grid).to(torch.int8)


def dequantize(codes: Tensor, grid: Grid) -> Tensor:
    """The weights of the codes (..., members), in the dtype of the scale."""
    return _values(codes.float(), grid).to(grid.scale.dtype)


def fake_quantize(groups: Tensor, grid: Grid) -> Tensor:
    """The nearest values of the grid: exactly `dequantize(quantize(groups, grid), grid)`.

    A second time it changes nothing, in bfloat16 too, where two codes may share a value.
    """
    return _values(_codes(groups, grid), grid).to(grid.scale.dtype)


def fake_quantize_(groups: Tensor, grid: Grid) -> None:
    """Puts the weights (..., members) on their nearest values: `fake_quantize` in place, which copies
    none of float32."""
    if groups.dtype == torch.float32:
        codes = _rounded_(groups.mul_(_inverse(grid)), grid)
        _values(codes.clamp_(grid.lowest, grid.highest), grid)
    else:
        groups.copy_(fake_quantize(groups, grid))


def stop_clipped_(gradient: Tensor, groups: Tensor, grid: Grid) -> None:
    """Zeroes in place the gradient of those weights (..., members) that lie beyond the nearest code."""
    codes = _unbounded(groups, grid).to(gradient.dtype)
    # The straight-through estimator of a clipped value is hardtanh's gradient: one pass over the
    # weights, where comparisons and a masked fill are several, and slow ones.
    torch.ops.aten.hardtanh_backward.grad_input(
        gradient, codes, grid.lowest - 0.5, grid.highest + 0.5, grad_input=gradient
    )


def _codes(groups: Tensor, grid: Grid) -> Tensor:
    return _unbounded(groups, grid).clamp_(grid.lowest, grid.highest)


def _unbounded(groups: Tensor, grid: Grid) -> Tensor:
    return _rounded_(groups.float() * _inverse(grid), grid)


def _inverse(grid: Grid) -> Tensor:
    return (1.0 / grid.scale.float()).unsqueeze(-1)


def _rounded_(ratios: Tensor, grid: Grid) -> Tensor:
    """In place, of weights as multiples of the scale."""
    # Adding 0 makes -0 positive, as an integer would.
    zero_point = 0.0 if grid.zero_point is None else grid.zero_point.float().unsqueeze(-1)
    return ratios.round_().add_(zero_point)


def _values(codes: Tensor, grid: Grid) -> Tensor:
    """In place, of codes as floats."""
    if grid.zero_point is not None:
        codes.sub_(grid.zero_point.float().unsqueeze(-1))
    return codes.mul_(grid.scale.float().unsqueeze(-1))
