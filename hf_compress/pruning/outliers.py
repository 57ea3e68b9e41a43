"""How many outliers the weights of a block hold: OWL shares out sparsity by it (papers/2310.05175)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

from hf_compress.calibration.batches import Batch, check_calibration
from hf_compress.calibration.layer_inputs import Seen
from hf_compress.calibration.layerwise import layer_by_layer
from hf_compress.calibration.requirements import check_experts, check_targets
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
            f"the mean of |w| times the norm of its input is {mean}, no finite number. If the model is "
            "in float16, load it in bfloat16 or float32."
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
    A block is a numbered layer of the model with all its targets; what is in none stands alone. The
    input of an expert is what is routed to it.

    calibration: batches, mappings of tensors as the model's forward takes them, on its device.
        Positions that an `attention_mask` names as padding do not count in inputs of its shape.
    threshold: how many times the mean makes an outlier; the paper takes 5, and 7 for some models.
    targets, ignore: see `hf_compress.targets.find_targets`.

    Raises ValueError for a threshold below 1, an empty calibration, targets that match nothing, are no
    Linear, Conv1D or experts or are not reached, padding where there are experts, and weights or
    activations that are not finite; TypeError for batches that are no mappings of tensors.
    """
    if not isinstance(threshold, int | float) or not 1.0 <= threshold < math.inf:
        raise ValueError(
            f"`threshold` is {threshold!r}: it is a multiple of the mean, 1 or more, such as 5."
        )
    selection = find_targets(model, targets, ignore)
    check_targets(model, selection, None)
    batches = check_calibration(calibration)
    check_experts(batches, selection)
    chosen = list(selection.targets.values())
    steps = layer_by_layer(model, batches, chosen, add_squares, desc="Measuring")
    seen = {target.name: inputs for target, inputs in steps}
    blocks: dict[str, list[Target]] = {}
    for target in chosen:
        block = _BLOCK.match(target.name)
        blocks.setdefault(block[0] if block else target.name, []).append(target)
    ratios: dict[str, float] = {}
    for members in blocks.values():
        ratio = outlier_ratio([_metric(model, t, seen[t.name]) for t in members], threshold)
        ratios |= {target.name: ratio for target in members}
    return {target.name: ratios[target.name] for target in chosen}


def _metric(model: nn.Module, target: Target, seen: Sequence[Seen]) -> Tensor:
    """|w| times the norm of its input, in the shape of the weight."""
    with align_module_device(model.get_submodule(target.owner)):  # loads what is offloaded
        weight = model.get_parameter(target.name).detach().abs()
    width = weight.shape[target.input_dim]
    nothing = torch.zeros(width, device=weight.device)  # for experts that no position reaches
    norms = torch.stack([nothing if s.total is None else s.total.sqrt() for s in seen])  # (experts, in)
    if target.stacked:
        norms = norms[:, None]
    return weight * (norms.T if target.input_dim == 0 else norms)
