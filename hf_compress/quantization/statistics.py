"""What one weight looks like: its distribution, and its distance to each grid at each width."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_compress.quantization.grids import GroupSize, fake_quantize
from hf_compress.quantization.schemes import Scheme, fit

# In the order in which equally good ones are preferred: without zero points first. "auto" is left out,
# since in each group it takes the best of these.
SCHEMES = {
    "absmax": ("absmax", True),
    "minmax": ("minmax", True),
    "percentile": ("percentile", True),
    "mse": ("mse", True),
    "affine minmax": ("minmax", False),
    "affine percentile": ("percentile", False),
    "affine mse": ("mse", False),
    "affine median": ("median", False),
}


def schemes_of(widths: Iterable[int], group_size: GroupSize) -> dict[int, dict[str, Scheme]]:
    """By bits, all of `SCHEMES` by label."""
    return {
        bits: {
            label: Scheme(bits=bits, group_size=group_size, symmetric=symmetric, grid=grid)
            for label, (grid, symmetric) in SCHEMES.items()
        }
        for bits in widths
    }


OUTLYING = 3.0

BINS = 100
# Weights on which grids are searched at once: they fit into a cache, and bound the memory.
_AT_ONCE = 2**19


@dataclass(frozen=True, kw_only=True)
class WeightStatistics:
    """One weight.

    spread: the standard deviation. skew, kurtosis: the third and fourth standardized moments, less 3
        for the kurtosis, so that both are 0 for a normal distribution; 0 too where all are equal.
    outliers: the fraction farther than 3 standard deviations from the mean; normal: 0.0027.
    norm: the root of the sum of squares.
    histogram: counts in 100 equal bins from `lowest` to `highest`.
    errors: ||w - q(w)|| / ||w|| by bits and grid; 0 where the weight is 0.
    ranges: the lowest and highest value of the grid, each averaged over the groups, by bits and grid.
    """

    shape: tuple[int, ...]
    median: float
    mean: float
    spread: float
    skew: float
    kurtosis: float
    outliers: float
    lowest: float
    highest: float
    norm: float
    histogram: list[int]
    errors: dict[int, dict[str, float]]
    ranges: dict[int, dict[str, tuple[float, float]]]

    def best(self, bits: int) -> str:
        """The grid with the lowest error; of equally good ones the one without zero points."""
        return min(self.errors[bits], key=self.errors[bits].__getitem__)


def statistics_of(
    weight: Tensor, groups: Tensor, schemes: dict[int, dict[str, Scheme]]
) -> WeightStatistics:
    """groups: the members of `weight` as (groups, members)."""
    norm, errors, ranges = _distances(groups, schemes)
    values = weight.float().flatten()
    size = values.numel()
    # Of an even number the mean of the two in the middle.
    middle = values.kthvalue((size + 1) // 2).values + values.kthvalue(size // 2 + 1).values
    lowest, highest = (bound.item() for bound in values.aminmax())
    spread, mean = (moment.item() for moment in torch.std_mean(values, correction=0))
    if lowest == highest:
        mean, spread, standard = lowest, 0.0, torch.zeros_like(values)
        histogram = [size] + [0] * (BINS - 1)
    else:
        standard = (values - mean) / spread
        # Not `histc`, whose counts are float32 and stand still at 2**24.
        bins = ((values - lowest) / (highest - lowest) * BINS).int().clamp_(max=BINS - 1)
        histogram = bins.bincount(minlength=BINS).tolist()
    return WeightStatistics(
        shape=tuple(weight.shape),
        median=middle.item() / 2,
        mean=mean,
        spread=spread,
        skew=standard.pow(3).mean().item(),
        kurtosis=standard.pow(4).mean().item() - 3 if spread else 0.0,
        outliers=int((standard.abs() > OUTLYING).sum()) / size,
        lowest=lowest,
        highest=highest,
        norm=norm,
        histogram=histogram,
        errors=errors,
        ranges=ranges,
    )


def _distances(
    groups: Tensor, schemes: dict[int, dict[str, Scheme]]
) -> tuple[float, dict[int, dict[str, float]], dict[int, dict[str, tuple[float, float]]]]:
    """The norm of the groups (groups, members), and by bits and grid their relative error and the mean
    ends of their ranges."""
    count, members = groups.shape
    squares = 0.0
    # For each width and grid the squared error, and the lowest and highest values of the grids, summed.
    sums = {bits: {label: [0.0, 0.0, 0.0] for label in its} for bits, its in schemes.items()}
    for part in groups.split(max(1, _AT_ONCE // members)):
        values = part.float()
        squares += values.square().sum().item()
        for bits, its in schemes.items():
            for label, scheme in its.items():
                grid = fit(part, scheme)
                error = (fake_quantize(part, grid).float() - values).square_().sum()
                scale = grid.scale.float()
                zero_point = 0.0 if grid.zero_point is None else grid.zero_point.float()
                low, high = (scale * (code - zero_point) for code in (grid.lowest, grid.highest))
                for place, part_sum in enumerate((error, low.sum(), high.sum())):
                    sums[bits][label][place] += part_sum.item()
    norm = math.sqrt(squares)
    errors = {
        bits: {label: math.sqrt(error) / norm if norm else 0.0 for label, (error, _, _) in its.items()}
        for bits, its in sums.items()
    }
    ranges = {
        bits: {label: (low / count, high / count) for label, (_, low, high) in its.items()}
        for bits, its in sums.items()
    }
    return norm, errors, ranges
