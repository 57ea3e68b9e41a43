"""How the weights of a model are distributed, and how near each grid comes to them."""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import align_module_device, has_offloaded_params
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.utils import logging

from hf_compress.figures import new_figure
from hf_compress.quantization.grids import (
    GRIDS,
    GroupSize,
    Scheme,
    check_divides,
    check_finite,
    fake_quantize,
    fit,
    grouped,
)
from hf_compress.targets import Selection, find_targets

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

OUTLYING = 3.0

ERRORS = "grid_errors.png"
HISTOGRAMS = "weight_histograms.png"

_STATISTICS = ("median", "mean", "spread", "skew", "kurtosis", "outliers")
_BINS = 100
_DRAWN = 6
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


@dataclass(frozen=True, kw_only=True)
class WeightAnalysis:
    """The weights of a model by name, and the reasons for those left out. `str()` is a table.

    Grids without "affine" are symmetric, `QuantizationCallback(grid="mse")`; the others have zero
    points, `QuantizationCallback(grid="mse", symmetric=False)` for "affine mse".
    """

    weights: dict[str, WeightStatistics]
    skipped: dict[str, str]
    bits: tuple[int, ...]
    group_size: GroupSize

    def errors(self, bits: int) -> dict[str, float]:
        """The relative error of all weights together, by grid."""
        total = math.hypot(*(weight.norm for weight in self.weights.values()))
        return {
            grid: math.hypot(*(w.errors[bits][grid] * w.norm for w in self.weights.values())) / total
            if total
            else 0.0
            for grid in SCHEMES
        }

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)

    def to_csv(self, path: str | Path) -> None:
        """One row for each weight: the statistics, then for each width its best grid and all errors."""
        best = {f"best_{bits}": bits for bits in self.bits}
        errors = {
            f"error_{bits}_{grid.replace(' ', '_')}": (bits, grid)
            for bits in self.bits
            for grid in SCHEMES
        }
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            head = ["weight", "shape", *_STATISTICS, "lowest", "highest", "norm"]
            writer.writerow([*head, *best, *errors])
            for name, weight in self.weights.items():
                writer.writerow(
                    [
                        name,
                        "x".join(map(str, weight.shape)),
                        *(vars(weight)[column] for column in head[2:]),
                        *(weight.best(bits) for bits in best.values()),
                        *(weight.errors[bits][grid] for bits, grid in errors.values()),
                    ]
                )

    def draw(self, folder: str | Path) -> None:
        """Two pictures into `folder`, which is made: `grid_errors.png`, the error of each grid at each
        width over the weights; and `weight_histograms.png`, the six weights that are the farthest from
        their best grid at the lowest width, with the range of the best grid at each width."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._draw_errors(folder / ERRORS)
        self._draw_histograms(folder / HISTOGRAMS)

    def _draw_errors(self, path: Path) -> None:
        figure = new_figure(9, 1 + 2.5 * len(self.bits))
        rows = figure.subplots(len(self.bits), 1, sharex=True, squeeze=False)[:, 0]
        places = range(len(self.weights))
        for axes, bits in zip(rows, self.bits, strict=True):
            for label, (grid, symmetric) in SCHEMES.items():
                axes.plot(
                    places,
                    [weight.errors[bits][label] for weight in self.weights.values()],
                    color=f"C{list(GRIDS).index(grid)}",
                    linestyle="-" if symmetric else "--",
                    marker=".",
                    label=label,
                )
            axes.set(ylabel=f"relative error, {bits} bit")
            axes.set_ylim(bottom=0)
        if len(self.weights) <= 16:
            rows[-1].set_xticks(places, list(self.weights), rotation=90, fontsize=7)
        else:
            rows[-1].set(xlabel="weight, from the first to the last")
        figure.legend(handles=rows[0].lines, loc="outside upper center", ncols=4, fontsize=8)
        figure.savefig(path)

    def _draw_histograms(self, path: Path) -> None:
        fewest = min(self.bits)
        farthest = sorted(self.weights.items(), key=lambda item: -min(item[1].errors[fewest].values()))
        drawn = farthest[:_DRAWN]
        figure = new_figure(9, 1 + 2 * len(drawn))
        rows = figure.subplots(len(drawn), 1, squeeze=False)[:, 0]
        for axes, (name, weight) in zip(rows, drawn, strict=True):
            step = (weight.highest - weight.lowest) / _BINS
            edges = [weight.lowest + step * place for place in range(_BINS + 1)]
            axes.stairs(weight.histogram, edges, fill=True, color="lightgrey")
            for place, bits in enumerate(self.bits):
                best = weight.best(bits)
                for value in weight.ranges[bits][best]:
                    axes.axvline(value, color=f"C{place}", linestyle=":")
                axes.plot([], [], color=f"C{place}", linestyle=":", label=f"{bits} bit: {best}")
            axes.set_yscale("log")
            axes.set_ylim(bottom=0.5)  # below a single weight, so that outliers are seen
            axes.set_title(name, fontsize=8)
            axes.legend(fontsize=7, loc="upper right")
        figure.supylabel("weights", fontsize=9)
        figure.savefig(path)

    def __str__(self) -> str:
        title = "best grid, relative error"
        name_width = max(len(title), *map(len, self.weights))
        grid_width = max(map(len, SCHEMES))
        best_width = grid_width + 8
        head = "".join(f"{column:>11}" for column in _STATISTICS)
        head += "".join(f"{f'{bits} bit':>{best_width}}" for bits in self.bits)
        rows = [f"  {title:{name_width}}{head}"]
        for name, weight in self.weights.items():
            row = "".join(f"{vars(weight)[column]:>11.3g}" for column in _STATISTICS)
            for bits in self.bits:
                best = weight.best(bits)
                row += f"{f'{best} {weight.errors[bits][best]:.4f}':>{best_width}}"
            rows.append(f"  {name:{name_width}}{row}")
        together = {bits: self.errors(bits) for bits in self.bits}
        head = "".join(f"{f'{bits} bit':>9}" for bits in self.bits)
        rows.append(f"  {'all together':{grid_width}}{head}")
        for grid in SCHEMES:
            row = "".join(f"{together[bits][grid]:>9.4f}" for bits in self.bits)
            rows.append(f"  {grid:{grid_width}}{row}")
        reasons = Counter(self.skipped.values()).most_common()
        rows.append(f"left out: {len(self.skipped)} weights")
        return "\n".join([*rows, *(f"  {count} x {reason}" for reason, count in reasons)])


@torch.no_grad()
def analyse(
    model: nn.Module,
    *,
    bits: int | Sequence[int] = (8, 4, 3, 2),
    group_size: GroupSize = None,
    targets: str | Sequence[str] | None = None,
    ignore: str | Sequence[str] | None = None,
) -> WeightAnalysis:
    """Looks at each target of `model`: its distribution, and its distance to each grid at each width.

    bits: widths, 2 to 8. group_size: see `hf_compress.quantization.grids.Scheme`, as the grids.
    targets, ignore: see `hf_compress.targets.find_targets`.

    "minmax", "percentile" and "mse" are measured twice, symmetric and with zero points ("affine ..."),
    "absmax" and "median" as their definitions have it: compare grids with zero points among
    themselves, since a zero point for each group costs size, and some file formats have none. Errors
    are those of training on the grid: scales and values have the dtype of the weight.

    Everything is computed in float32, one weight at a time, in time and memory linear in its size; the
    model is not changed. Offloaded weights are loaded one by one.

    Raises ValueError for `bits` or a `group_size` out of range or that does not divide the inputs,
    targets that match nothing, and weights that are packed, sharded, without values or not finite.
    """
    widths = tuple(bits) if isinstance(bits, Sequence) else (bits,)
    if not widths or len({*widths}) < len(widths):
        raise ValueError(f"`bits` is {bits!r}: pass one width or several different ones, as (8, 4).")
    schemes = {
        width: {
            label: Scheme(bits=width, group_size=group_size, symmetric=symmetric, grid=grid)
            for label, (grid, symmetric) in SCHEMES.items()
        }
        for width in widths
    }
    selection = find_targets(model, targets, ignore)
    _check(model, selection, group_size)
    weights = {}
    for name, target in logging.tqdm(selection.targets.items(), desc="Analysing", unit="weight"):
        with align_module_device(model.get_submodule(target.owner)):  # loads what is offloaded
            weight = model.get_parameter(name)
            groups = grouped(weight, input_dim=target.input_dim, group_size=group_size)
            weights[name] = _analysed(weight, groups.reshape(-1, groups.shape[-1]), schemes)
    return WeightAnalysis(
        weights=weights, skipped=selection.skipped, bits=widths, group_size=group_size
    )


def _check(model: nn.Module, selection: Selection, group_size: GroupSize) -> None:
    for name in selection.skipped:
        dtype = model.get_parameter(name).dtype
        if not dtype.is_floating_point:
            raise ValueError(
                f"{name} is packed as {dtype}: what it was before can no longer be seen. Load the "
                "model without quantization."
            )
    for name, target in selection.targets.items():
        owner, param = model.get_submodule(target.owner), target.param
        if isinstance(param, DTensor):
            raise ValueError(f"{name} is sharded: analyse the model before it is distributed.")
        if param.is_meta and not has_offloaded_params(owner):
            raise ValueError(f"{name} is on the meta device: load the weights of the model first.")
        check_divides(name, param, input_dim=target.input_dim, group_size=group_size)
        with align_module_device(owner):
            check_finite(name, model.get_parameter(name))


def _analysed(
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
        histogram = [size] + [0] * (_BINS - 1)
    else:
        standard = (values - mean) / spread
        # Not `histc`, whose counts are float32 and stand still at 2**24.
        bins = ((values - lowest) / (highest - lowest) * _BINS).int().clamp_(max=_BINS - 1)
        histogram = bins.bincount(minlength=_BINS).tolist()
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
