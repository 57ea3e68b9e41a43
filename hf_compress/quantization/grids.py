"""Integer grids: where one lies for a weight, rounding to it, and back.

A group of weights shares a scale s and an integer zero point z; its grid is the values s * (q - z) of
the codes q of `bits` bits, from -2**(bits - 1) to 2**(bits - 1) - 1. The zero point is a code too, so
that zero is always on the grid and what is pruned stays zero.

Everything is computed in float32, and the scale has the dtype of the weight: files and optimizer
checkpoints keep it in that dtype, and would change any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from hf_compress.distributed import local, sum_over_shards

# Clipping ratios of the searches: 48 of them, from all of the range down to 5 % of it.
RATIOS = tuple(0.94**i for i in range(48))

QUANTILE = 0.999

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


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """What kind of grid a weight gets.

    bits: 2 to 8.
    group_size: input features of one output feature that share a scale; None for all of them, "tensor"
        for one scale in each matrix (in stacked experts: for each expert).
    symmetric: whether all zero points are 0.
    grid: how the scale and the zero point are found, with n = 2**bits:
        "absmax": the largest magnitude over (n - 1) / 2; symmetric. Large positive weights may be
            clipped by half a step.
        "minmax": the smallest scale that clips nothing.
        "percentile": the same without the largest and smallest thousandth of the weights, hence as
            "minmax" in groups of less than 1000.
        "mse": of "minmax" clipped to 5 ... 100 %, what has the lowest squared error. Below zero is
            one code more than above it: symmetric grids of less than 8 bits give it to the side that
            reaches further, by a negative scale where that is the positive one.
        "median": the zero point puts the middle of the codes at the median; of the scales down from the
            largest deviation, what has the lowest squared error. Not symmetric.
        "auto": in each group, the one of these with the lowest squared error.

    Raises ValueError for anything else.
    """

    bits: int
    group_size: GroupSize = None
    symmetric: bool = True
    grid: str = "mse"

    def __post_init__(self) -> None:
        check_bits("bits", self.bits)
        size = self.group_size
        if size not in (None, "tensor") and (type(size) is not int or size < 2):
            raise ValueError(
                f"`group_size` is {size!r}: pass the number of input features that share a scale, 2 or "
                "more, such as 64; None for all of an output feature, 'tensor' for all of a matrix."
            )
        if self.grid not in GRIDS:
            raise ValueError(f"`grid` is {self.grid!r}; allowed are {sorted(GRIDS)}.")
        if self.grid == "median" and self.symmetric:
            raise ValueError("grid 'median' has a zero point: pass `symmetric=False` with it.")
        if self.grid == "absmax" and not self.symmetric:
            raise ValueError("grid 'absmax' is symmetric: for zero points take 'minmax'.")

    @property
    def searched(self) -> bool:
        """Whether the grid is searched for, or sorts the weights: some fifty times dearer to fit."""
        return self.grid not in ("absmax", "minmax")


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


def fit(groups: Tensor, scheme: Scheme) -> Grid:
    """The grid of `scheme` for finite weights, (..., members); of equally good ones the first."""
    weight = groups.float()
    candidates = GRIDS[scheme.grid](weight, scheme, groups.dtype)
    best = next(candidates)
    error: Tensor | None = None
    for other in candidates:
        if error is None:
            error = _error(weight, best)
        its_error = _error(weight, other)
        better = its_error < error
        best = _where(better, other, best)
        error = torch.minimum(error, its_error)
    return best


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


def _error(weight: Tensor, grid: Grid) -> Tensor:
    return fake_quantize(weight, grid).float().sub_(weight).square_().sum(-1)


def _where(better: Tensor, one: Grid, other: Grid) -> Grid:
    zero_point = None
    if one.zero_point is not None and other.zero_point is not None:
        zero_point = torch.where(better, one.zero_point, other.zero_point)
    return Grid(scale=torch.where(better, one.scale, other.scale), zero_point=zero_point, bits=one.bits)


def _over(low: Tensor, high: Tensor, scheme: Scheme, dtype: torch.dtype) -> Grid:
    """The finest grid from `low` (0 or less) to `high` (0 or more)."""
    lowest, highest = -(2 ** (scheme.bits - 1)), 2 ** (scheme.bits - 1) - 1
    if scheme.symmetric:
        scale = _positive(torch.maximum(low / lowest, high / highest), dtype)
        return Grid(scale=scale, zero_point=None, bits=scheme.bits)
    scale = _positive((high - low) / (highest - lowest), dtype)
    zero_point = (lowest - (low / scale.float()).round_()).clamp_(lowest, highest)
    return Grid(scale=scale, zero_point=zero_point.to(dtype), bits=scheme.bits)


def _positive(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """As `dtype`, but never so small that its inverse overflows: groups of zeros have a scale too."""
    info = torch.finfo(dtype)
    smallest = max(info.smallest_normal * info.eps, torch.finfo(torch.float32).smallest_normal)
    return scale.clamp(min=smallest).to(dtype)


def _range(weight: Tensor) -> tuple[Tensor, Tensor]:
    return weight.amin(-1).clamp_(max=0), weight.amax(-1).clamp_(min=0)


def _absmax(weight: Tensor, scheme: Scheme, dtype: torch.dtype) -> Iterator[Grid]:
    low, high = _range(weight)
    scale = _positive(torch.maximum(-low, high) / ((2**scheme.bits - 1) / 2), dtype)
    yield Grid(scale=scale, zero_point=None, bits=scheme.bits)


def _minmax(weight: Tensor, scheme: Scheme, dtype: torch.dtype) -> Iterator[Grid]:
    yield _over(*_range(weight), scheme, dtype)


def _percentile(weight: Tensor, scheme: Scheme, dtype: torch.dtype) -> Iterator[Grid]:
    members = weight.shape[-1]
    dropped = int((1 - QUANTILE) * members)
    low = weight.kthvalue(1 + dropped, dim=-1).values.clamp_(max=0)
    high = weight.kthvalue(members - dropped, dim=-1).values.clamp_(min=0)
    yield _over(low, high, scheme, dtype)


def _mse(weight: Tensor, scheme: Scheme, dtype: torch.dtype) -> Iterator[Grid]:
    low, high = _range(weight)
    # At 8 bits nothing is won by it, and integer kernels may count on a positive scale.
    turned = (high > -low) & (scheme.symmetric and scheme.bits < 8)
    low, high = torch.where(turned, -high, low), torch.where(turned, -low, high)
    for ratio in RATIOS:
        grid = _over(ratio * low, ratio * high, scheme, dtype)
        yield replace(grid, scale=torch.where(turned, -grid.scale, grid.scale))


def _median(weight: Tensor, scheme: Scheme, dtype: torch.dtype) -> Iterator[Grid]:
    lowest, highest = -(2 ** (scheme.bits - 1)), 2 ** (scheme.bits - 1) - 1
    members = weight.shape[-1]
    # Of an even number the mean of the two in the middle, so that symmetric weights have median 0.
    below = weight.kthvalue((members + 1) // 2, dim=-1).values
    median = (below + weight.kthvalue(members // 2 + 1, dim=-1).values) / 2
    deviation = (weight - median.unsqueeze(-1)).abs_().amax(-1)
    # Never so fine that no code is left for zero: the largest scale must reach it.
    largest = torch.maximum(deviation / highest, median.abs() / -lowest)
    for ratio in RATIOS:
        scale = _positive(ratio * largest, dtype)
        zero_point = (median / scale.float()).round_().neg_().clamp_(lowest, highest)
        yield Grid(scale=scale, zero_point=zero_point.to(dtype), bits=scheme.bits)


def _auto(weight: Tensor, scheme: Scheme, dtype: torch.dtype) -> Iterator[Grid]:
    for candidates in (_minmax, _mse, _percentile, _absmax if scheme.symmetric else _median):
        yield from candidates(weight, scheme, dtype)


Candidates = Callable[[Tensor, Scheme, torch.dtype], Iterator[Grid]]

GRIDS: dict[str, Candidates] = {
    "absmax": _absmax,
    "auto": _auto,
    "median": _median,
    "minmax": _minmax,
    "mse": _mse,
    "percentile": _percentile,
}
