"""How the weights of a model are distributed, and how near each grid comes to them."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import align_module_device, has_offloaded_params
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.utils import logging

from hf_compress.quantization.grids import GroupSize, check_divides, check_finite, grouped
from hf_compress.quantization.pictures import draw_errors, draw_histograms
from hf_compress.quantization.statistics import SCHEMES, WeightStatistics, schemes_of, statistics_of
from hf_compress.targets import Selection, counted, find_targets

ERRORS = "grid_errors.png"
HISTOGRAMS = "weight_histograms.png"

_STATISTICS = ("median", "mean", "spread", "skew", "kurtosis", "outliers")


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
        their best grid at the lowest width, with their medians and the range of the best grid at each
        width."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        draw_errors(self.weights, self.bits, folder / ERRORS)
        draw_histograms(self.weights, self.bits, folder / HISTOGRAMS)

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
        rows.append(f"left out: {len(self.skipped)} weights")
        return "\n".join([*rows, *(f"  {reason}" for reason in counted(self.skipped))])


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

    bits: widths, 2 to 8. group_size: see `hf_compress.quantization.schemes.Scheme`, as the grids.
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
    schemes = schemes_of(widths, group_size)
    selection = find_targets(model, targets, ignore)
    _check(model, selection, group_size)
    weights = {}
    for name, target in logging.tqdm(selection.targets.items(), desc="Analysing", unit="weight"):
        with align_module_device(model.get_submodule(target.owner)):  # loads what is offloaded
            weight = model.get_parameter(name)
            groups = grouped(weight, input_dim=target.input_dim, group_size=group_size)
            weights[name] = statistics_of(weight, groups.reshape(-1, groups.shape[-1]), schemes)
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
