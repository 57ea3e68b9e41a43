"""Weights that were trained on integer grids, as they are in the written files."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import CompressedTensorsConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from hf_compress.publishing.audit import Audit, audit, count_tensor
from hf_compress.publishing.naming import general_name
from hf_compress.publishing.pictures import CODES, draw_codes
from hf_compress.quantization.analysis import WeightAnalysis
from hf_compress.quantization.grids import Grid, GroupSize, dequantize, grouped, quantize
from hf_compress.quantization.statistics import SCHEMES, WeightStatistics, schemes_of, statistics_of
from hf_compress.targets import find_targets


@dataclass(frozen=True, kw_only=True)
class Kind:
    """Weights whose names differ in numbers only, as those of one layer and the next, and whose grids
    are alike.

    per_scale: weights that share a scale. codes: the fraction of the 2**bits codes that occur.
    zeros: the fraction of weights that are 0. error: ||w - q(w)|| / ||w|| of the dense model's weights
    and this kind of grid, without any training; None where there is no dense model of these weights.
    """

    name: str
    weights: int
    parameters: int
    bits: int
    per_scale: int
    zero_points: bool
    codes: float
    zeros: float
    error: float | None


@dataclass(frozen=True, kw_only=True)
class _Opened:
    """One weight as the files hold it, with the grid it was trained on, on the CPU."""

    weight: Tensor
    grid: Grid
    input_dim: int
    group_size: GroupSize

    @property
    def groups(self) -> Tensor:
        return self.grouped(self.weight)

    def grouped(self, weight: Tensor) -> Tensor:
        return grouped(weight, input_dim=self.input_dim, group_size=self.group_size)


def inspect_integers(
    folder: Path,
    model: PreTrainedModel,
    grids: Mapping[str, Grid],
    *,
    format: str,
    targets: Sequence[str],
    baseline: PreTrainedModel | None,
    chosen: Mapping[str, str],
) -> tuple[Audit, dict[str, Any]]:
    """The audit of the files of `model` in `folder`, and the part of `report.json` about integers.

    The integers are opened again, and counted as the weights that they stand for, with their bytes as
    stored. Draws into `folder` how often each code occurs, and with a `baseline` of the same weights
    what `WeightAnalysis.draw` does. chosen: how the grid of each weight was found, as
    `QuantizationCallback(grid=...)`.

    Raises ValueError where a weight of the files is not on its grid or not that of `model`, and as
    `audit`.
    """
    opened = _open(folder, model, grids, format)
    counts = {}
    for name, found in opened.items():
        trained = model.get_parameter(name).detach().cpu()
        codes = quantize(found.groups, found.grid)
        on_grid = dequantize(codes, found.grid).equal(found.groups)
        if not (on_grid and found.weight.equal(trained)):
            raise ValueError(
                f"{name} is not on the grid that it was trained on, as the files hold it: something "
                "changed it after the training. Load the last checkpoint, or train again."
            )
        counts[name] = _counts(codes)
    analysis = _analyse_dense(baseline, opened)
    draw_codes(sum(counts.values(), Counter()), folder / CODES)
    if analysis is not None:
        analysis.draw(folder)
    part = {
        "format": format,
        "bits": max(grid.bits for grid in grids.values()),
        "weights": len(grids),
        "parameters": sum(found.weight.numel() for found in opened.values()),
        "kinds": [
            asdict(_kind(names, opened, counts, analysis, chosen)) for names in _alike(opened).values()
        ],
        "errors": analysis and {str(bits): analysis.errors(bits) for bits in analysis.bits},
    }
    if format == "dense":
        return audit(folder, targets=targets), part
    weights = {name: found.weight for name, found in opened.items()}
    widths = {name: grid.bits for name, grid in grids.items()}
    counted = count_as_weights(audit(folder), model, weights, widths)
    return replace(counted, targets=tuple(targets)), part


def reopen(folder: Path, kind: Any, format: str) -> PreTrainedModel:
    """The model of class `kind` that `save_quantized` wrote to `folder` in `format`, its integers as
    floats: see `float_weight`."""
    packed = format == "compressed-tensors"
    settings = CompressedTensorsConfig(dequantize=True) if packed else None
    return kind.from_pretrained(folder, quantization_config=settings)


def float_weight(model: PreTrainedModel, name: str) -> Tensor:
    """One weight of a model that was reopened."""
    param: Any = model.get_parameter(name)
    is_torchao = bool(is_traceable_wrapper_subclass(param))
    return param.dequantize() if is_torchao else param.detach()


def count_as_weights(
    stored: Audit, model: PreTrainedModel, weights: Mapping[str, Tensor], bits: Mapping[str, int]
) -> Audit:
    """The audit of files of integers, with these `weights` counted instead of what they are stored as,
    with the bytes of that. bits: by the same names. model: tells the names of the files."""
    tensors = dict(stored.tensors)
    for name in weights:
        # Experts are stacked in the model, and have files of their own.
        for written, weight in revert_weight_conversion(model, {name: weights[name]}).items():
            layer = written.removesuffix("weight")
            keys = [key for key in tensors if key.startswith((f"{layer}weight", f"{layer}_weight_"))]
            size = sum(tensors.pop(key).bytes for key in keys)
            tensors[written] = replace(count_tensor(weight), dtype=f"int{bits[name]}", bytes=size)
    return replace(stored, tensors=tensors)


def _open(
    folder: Path, model: PreTrainedModel, grids: Mapping[str, Grid], format: str
) -> dict[str, _Opened]:
    reopened = reopen(folder, type(model), format)
    targets = find_targets(model, list(grids)).targets
    opened = {}
    for name, grid in grids.items():
        weight = float_weight(reopened, name)
        dim = targets[name].input_dim
        # One scale for each output feature is a group of all its inputs.
        whole = grid.scale.shape[-2:] == (1, 1)
        opened[name] = _Opened(
            weight=weight,
            grid=Grid(
                scale=grid.scale.cpu(),
                zero_point=None if grid.zero_point is None else grid.zero_point.cpu(),
                bits=grid.bits,
            ),
            input_dim=dim,
            group_size="tensor" if whole else weight.shape[dim] // grid.scale.shape[dim],
        )
    return opened


def _counts(codes: Tensor) -> Counter[int]:
    values, counts = codes.unique(return_counts=True)
    return Counter(dict(zip(values.tolist(), counts.tolist(), strict=True)))


def _analyse_dense(
    baseline: PreTrainedModel | None, opened: Mapping[str, _Opened]
) -> WeightAnalysis | None:
    """As `hf_compress.quantization.analysis.analyse`, of these weights also where a teacher's are
    frozen."""
    dense = {} if baseline is None else dict(baseline.named_parameters())
    if any(
        name not in dense or dense[name].shape != found.weight.shape for name, found in opened.items()
    ):
        return None
    widths = tuple(sorted({found.grid.bits for found in opened.values()}, reverse=True))
    weights = {}
    for name, found in opened.items():
        schemes = schemes_of(widths, found.group_size)
        weight = dense[name].detach()
        groups = found.grouped(weight)
        weights[name] = statistics_of(weight, groups.reshape(-1, groups.shape[-1]), schemes)
    return WeightAnalysis(
        weights=weights, skipped={}, bits=widths, group_size=next(iter(opened.values())).group_size
    )


def _alike(opened: Mapping[str, _Opened]) -> dict[tuple[object, ...], list[str]]:
    kinds: dict[tuple[object, ...], list[str]] = {}
    for name, found in opened.items():
        symmetric = found.grid.zero_point is None
        key = (general_name(name), found.grid.bits, found.groups.shape[-1], symmetric)
        kinds.setdefault(key, []).append(name)
    return kinds


def _kind(
    names: Sequence[str],
    opened: Mapping[str, _Opened],
    counts: Mapping[str, Counter[int]],
    analysis: WeightAnalysis | None,
    chosen: Mapping[str, str],
) -> Kind:
    first = opened[names[0]]
    grid, parameters = first.grid, sum(opened[name].weight.numel() for name in names)
    nonzeros = sum(int(opened[name].weight.count_nonzero()) for name in names)
    symmetric = grid.zero_point is None
    error = None
    if analysis is not None:
        dense = {name: analysis.weights[name] for name in names}
        norm = math.hypot(*(weight.norm for weight in dense.values()))
        moved = math.hypot(
            *(_error(w, grid.bits, chosen[name], symmetric) * w.norm for name, w in dense.items())
        )
        error = moved / norm if norm else 0.0
    return Kind(
        name=general_name(names[0]),
        weights=len(names),
        parameters=parameters,
        bits=grid.bits,
        per_scale=first.groups.shape[-1],
        zero_points=not symmetric,
        codes=len(set().union(*(counts[name] for name in names))) / 2**grid.bits,
        zeros=1 - nonzeros / parameters,
        error=error,
    )


def _error(weight: WeightStatistics, bits: int, grid: str, symmetric: bool) -> float:
    labels = {scheme: label for label, scheme in SCHEMES.items()}
    # "auto" is none of them: in each group it takes the best, and is no worse than the best for all.
    return weight.errors[bits][labels.get((grid, symmetric), weight.best(bits))]
