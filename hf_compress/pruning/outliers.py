"""How many outliers the weights of a block hold: OWL shares out sparsity by it (papers/2310.05175)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from hf_compress.pruning.calibration import Batch, check_calibration, evaluating, padding_mask
from hf_compress.pruning.oneshot.wanda import add_squares
from hf_compress.targets import Target, find_targets

# "model.layers.3" of "model.layers.3.mlp.up_proj.weight"
_BLOCK = re.compile(r".*?\.\d+(?=\.)")


def outlier_ratio(metrics: Sequence[Tensor], threshold: float = 5.0) -> float:
    """The part of all entries of `metrics` that is above `threshold` times their common mean.

    Raises ValueError where that is not finite.
    """
    size = sum(metric.numel() for metric in metrics)
    mean = sum(metric.double().sum().item() for metric in metrics) / size
    if not math.isfinite(mean):
        raise ValueError(
            f"the mean is {mean}. If the model is in float16, load it in bfloat16 or float32."
        )
    return sum(int((metric > threshold * mean).sum()) for metric in metrics) / size


@torch.no_grad()
def outlier_ratios(
    model: nn.Module,
    calibration: Iterable[Batch],
    *,
    threshold: float = 5.0,
    targets: str | Sequence[str] | None = None,
    ignore: str | Sequence[str] | None = None,
) -> dict[str, float]:
    """For each target the `outlier_ratio` of its block, as `hf_compress.pruning.allocate.owl` takes it.

    The metric of a weight is |w| times the L2 norm of its input over the calibration, as Wanda has it.
    A block is a numbered layer of the model with all its targets; what is in none stands alone.

    calibration: batches, mappings of tensors as the model's forward takes them, on its device.
        Positions that an `attention_mask` names as padding do not count in inputs of its shape.
    threshold: how many times the mean makes an outlier; the paper takes 5, and 7 for some models.
    targets, ignore: see `hf_compress.targets.find_targets`.

    Raises ValueError for a threshold below 1, an empty calibration, targets that match nothing, are no
    Linear or Conv1D or are not reached, and activations that are not finite; TypeError for batches that
    are no mappings of tensors.
    """
    if not 1.0 <= threshold < math.inf:
        raise ValueError(f"`threshold` is {threshold!r}: it is a multiple of the mean, such as 5.")
    chosen = find_targets(model, targets, ignore).targets
    squares = _squared_inputs(model, chosen, check_calibration(calibration))
    blocks: dict[str, list[str]] = {}
    for name in chosen:
        block = _BLOCK.match(name)
        blocks.setdefault(block[0] if block else name, []).append(name)
    ratios: dict[str, float] = {}
    for names in blocks.values():
        metrics = [_metric(chosen[name], squares[name]) for name in names]
        ratios |= dict.fromkeys(names, outlier_ratio(metrics, threshold))
    return {name: ratios[name] for name in chosen}


def _squared_inputs(
    model: nn.Module, targets: Mapping[str, Target], batches: Sequence[Batch]
) -> dict[str, Tensor]:
    """For each target the sum over all positions of the squares of its inputs, (in,)."""
    sums: dict[str, Tensor] = {}
    mask: Tensor | None = None

    def add(name: str, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs = args[0]
        if mask is not None and inputs.shape[:-1] == mask.shape:
            inputs = inputs[mask.to(inputs.device)]
        sums[name] = add_squares(sums.get(name), inputs.float().flatten(end_dim=-2))

    layers = {name: model.get_submodule(target.owner) for name, target in targets.items()}
    for name, layer in layers.items():
        if not isinstance(layer, nn.Linear | Conv1D):
            raise ValueError(
                f"the inputs of {name} cannot be seen from outside {type(layer).__name__}: leave it "
                f"out, ignore=[{name!r}]."
            )
    hooks = [layer.register_forward_pre_hook(partial(add, name)) for name, layer in layers.items()]
    try:
        with evaluating(model):
            for batch in logging.tqdm(batches, desc="Measuring", unit="batch"):
                mask = padding_mask(batch, "attention_mask")
                model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    if unseen := [name for name in targets if name not in sums]:
        raise ValueError(
            f"the calibration does not reach {len(unseen)} targets, {unseen[:3]} among them: give "
            "batches that do, or leave them out by `ignore`."
        )
    return sums


def _metric(target: Target, squares: Tensor) -> Tensor:
    """|w| times the norm of its input, in the shape of the weight."""
    norms = squares.sqrt()
    return target.param.detach().abs() * (norms[:, None] if target.input_dim == 0 else norms)
