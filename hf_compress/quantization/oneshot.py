"""One-shot quantization: a trained model is put on integer grids, without a gradient."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import replace
from functools import lru_cache
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from transformers.utils import logging

from hf_compress.calibration.batches import Batch, check_calibration
from hf_compress.calibration.casts import fresh_casts
from hf_compress.calibration.layer_inputs import Seen
from hf_compress.calibration.layerwise import layer_by_layer, matrices
from hf_compress.calibration.offloading import in_memory
from hf_compress.calibration.requirements import check_damping, check_experts, check_targets
from hf_compress.calibration.second_order import add_gram
from hf_compress.quantization.blockwise import round_block_by_block
from hf_compress.quantization.gptq import gptq, ordered_factor
from hf_compress.quantization.grids import Grid, GroupSize, check_divides, fake_quantize, grouped
from hf_compress.quantization.schemes import Scheme, fit
from hf_compress.targets import Target, find_targets

Rounding = Literal["rtn", "gptq", "blockwise"]

STEPS = 200


@torch.no_grad()
@fresh_casts()
def quantize_oneshot_(
    model: nn.Module,
    calibration: Iterable[Batch] | None = None,
    *,
    bits: int,
    group_size: GroupSize = None,
    grid: str = "mse",
    symmetric: bool = True,
    method: Rounding = "rtn",
    targets: str | Sequence[str] | None = None,
    ignore: str | Sequence[str] | None = None,
    damping: float = 0.01,
    steps: int = STEPS,
) -> dict[str, Grid]:
    """Puts the weights of `model` on integer grids in place, and returns these by name.

    calibration: of "gptq" and "blockwise": batches, mappings of tensors as the model's forward takes;
        some 32 to 128 rows of what the model is meant for. How they are cut into batches does not
        matter for "gptq"; a step of "blockwise" takes one of them, of some four rows.
    bits, group_size, grid, symmetric: see `hf_compress.quantization.schemes.Scheme`.
    method: "rtn" rounds each weight to the nearest value of its grid; "gptq" (arXiv:2210.17323) rounds
        one input feature after the other, those with the largest inputs first, and lets the rest make
        up for the error, on the same grid; "blockwise" (as BRECQ, arXiv:2102.05426, AutoRound,
        arXiv:2309.05516, and EfficientQAT, arXiv:2407.11062) trains the weights and the scales of one
        block of layers after the other, so that it answers as the dense one: dearer, for few bits.
    targets, ignore: see `hf_compress.targets.find_targets`. By default the Linear and Conv1D layers
        and experts of the backbone.
    damping: of "gptq": what is added to the Hessian as a fraction of its mean diagonal.
    steps: of "blockwise": of the training of each block.

    What is zero stays zero, so that a pruned model stays pruned. The weights are floats of the grid, in
    their dtype: `save_quantized(model, folder, grids=...)` writes exactly these as integers.

    A training goes on from exactly there with `QuantizationCallback(bits, grids=..., ...)` of the same
    scheme. Without `grids` it fits its own to these weights: the same, but for float rounding, after
    "rtn" on "minmax", "percentile" and mostly "mse"; on "absmax" one that is 1 / (2**bits - 1) narrower
    or wider; on the others, and after "gptq", which may leave the outermost codes unused, one that
    moves the weights by a few percent at 4 bits.

    For "gptq" all batches go through the model once, in evaluation mode, each layer rounded as soon as
    all of them stand before it: for memory, batches, and offloaded weights see `prune_oneshot_`.
    Experts to which no position is routed are rounded to nearest. For "blockwise", see
    `hf_compress.quantization.blockwise.round_block_by_block`, all batches stand before the same block
    twice, and one block has its gradients and moments in memory.

    Raises ValueError before anything is changed for wrong settings, targets that match nothing, weights
    that are packed, sharded, not finite or on the meta device, a `group_size` that does not divide, and
    calibration that is missing, empty, NaN, not wanted by "rtn" or that does not reach a layer, and
    TypeError for calibration that is not made of tensors; ValueError for "blockwise" where weights are
    offloaded or not in float32; on the way, with layers already rounded, where batches are not of one
    kind, or where inputs are NaN or infinite.
    """
    scheme = Scheme(bits=bits, group_size=group_size, symmetric=symmetric, grid=grid)
    if method not in get_args(Rounding):
        raise ValueError(f"`method` is {method!r}; there are {', '.join(get_args(Rounding))}.")
    check_damping(damping)
    if type(steps) is not int or steps < 1:
        raise ValueError(
            f"`steps` is {steps!r}: pass how many the training of a block takes, 1 or more."
        )
    selection = find_targets(model, targets, ignore)
    check_targets(model, selection, None)
    for name, target in selection.targets.items():
        check_divides(name, target.param, input_dim=target.input_dim, group_size=group_size)
    chosen = list(selection.targets.values())
    if method == "rtn":
        if calibration is not None:
            raise ValueError(
                "'rtn' reads no `calibration`: leave it out, or pass `method=\"gptq\"` or "
                '"blockwise", which do.'
            )
        return _round_to_nearest(model, chosen, scheme)
    if calibration is None:
        raise ValueError(f"{method!r} needs `calibration`, batches of what the model is meant for.")
    batches = check_calibration(calibration)
    if method == "blockwise":
        for target in chosen:
            _check_trainable(target)
        return round_block_by_block(model, batches, chosen, scheme, steps=steps)
    check_experts(batches, selection)
    return _round_layer_by_layer(model, batches, chosen, scheme, damping)


def _round_to_nearest(model: nn.Module, targets: Sequence[Target], scheme: Scheme) -> dict[str, Grid]:
    grids = {}
    for target in logging.tqdm(targets, desc="Quantizing", unit="weight"):
        with in_memory(model, target.name) as param:
            groups = grouped(param, input_dim=target.input_dim, group_size=scheme.group_size)
            grids[target.name] = grid = fit(groups, scheme)
            groups.copy_(fake_quantize(groups, grid))
    return grids


def _round_layer_by_layer(
    model: nn.Module,
    batches: Sequence[Batch],
    targets: Sequence[Target],
    scheme: Scheme,
    damping: float,
) -> dict[str, Grid]:
    grids = {}

    @lru_cache(maxsize=1)  # query, key and value come one after the other
    def prepared(seen: Seen, width: int) -> tuple[Tensor, Tensor]:
        # Inputs that all count alike make it round to nearest.
        gram = torch.zeros(width, width) if seen.total is None else seen.total
        return ordered_factor(gram, damping=damping)

    steps = layer_by_layer(model, batches, targets, add_gram, desc="Quantizing")
    with closing(steps):
        for target, seen in steps:
            with in_memory(model, target.name) as param:
                groups = grouped(param, input_dim=target.input_dim, group_size=scheme.group_size)
                grids[target.name] = grid = fit(groups, scheme)
                parts = zip(matrices(param, target), _by_matrix(grid, target), seen, strict=True)
                for matrix, its_grid, inputs in parts:
                    order, factor = prepared(inputs, matrix.shape[1])
                    order, factor = order.to(matrix.device), factor.to(matrix.device)
                    matrix.copy_(gptq(matrix.float(), order, factor, its_grid))
    return grids


def _check_trainable(target: Target) -> None:
    if target.param.is_meta:
        raise ValueError(
            f"`{target.name}` is offloaded, and 'blockwise' trains it: load the model into memory, or "
            'pass `method="gptq"`.'
        )
    if target.param.dtype != torch.float32:
        raise ValueError(
            f"`{target.name}` is {target.param.dtype}, too coarse for the small steps of 'blockwise': "
            'load the model with `dtype=torch.float32`, or pass `method="gptq"`. Under '
            "`torch.autocast` it still computes in bfloat16."
        )


def _by_matrix(grid: Grid, target: Target) -> list[Grid]:
    """The grids of `matrices(weight, target)`, each with scales (out, groups), or (1, 1)."""
    scales = matrices(grid.scale, target)
    if grid.zero_point is None:
        return [replace(grid, scale=scale) for scale in scales]
    zero_points = matrices(grid.zero_point, target)
    return [
        replace(grid, scale=scale, zero_point=zero_point)
        for scale, zero_point in zip(scales, zero_points, strict=True)
    ]
