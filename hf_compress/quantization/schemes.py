"""Where the integer grid of a weight lies: a scheme, and fitting it to groups of weights.

As in `hf_compress.quantization.grids`, scales are found in float32 and kept in the dtype of the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_compress.quantization.grids import Grid, GroupSize, check_bits, fake_quantize

# Clipping ratios of the searches: 48 of them, from all of the range down to 5 % of it.
RATIOS = tuple(0.94**i for i in range(48))

QUANTILE = 0.999


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
