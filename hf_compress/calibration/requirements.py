"""What compression in one shot needs, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Sequence

from accelerate.utils import has_offloaded_params
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from hf_compress.calibration.batches import Batch, padding_mask
from hf_compress.calibration.layer_inputs import Seen
from hf_compress.targets import Selection

logger = logging.get_logger(__name__)


def check_damping(damping: float) -> None:
    """Raises ValueError where `damping` is not above 0."""
    if not isinstance(damping, int | float) or not 0.0 < damping < math.inf:
        raise ValueError(f"`damping` is {damping!r}: it is a fraction above 0, such as 0.01.")


def check_targets(model: nn.Module, selection: Selection, n_of_m: tuple[int, int] | None) -> None:
    for name, target in selection.targets.items():
        owner, param = model.get_submodule(target.owner), target.param
        stacked = "Experts" in type(owner).__name__
        if not (stacked or isinstance(owner, (nn.Linear, Conv1D))):
            raise ValueError(
                f"`{name}` belongs to a {type(owner).__name__}: only Linear, Conv1D and stacked "
                f"experts can be compressed in one shot. Leave it out: `ignore=[{name!r}]`."
            )
        if isinstance(param, DTensor):
            raise ValueError(f"`{name}` is sharded: compress the model before it is distributed.")
        if param.is_meta and not has_offloaded_params(owner):
            raise ValueError(f"`{name}` is on the meta device: load the weights of the model first.")
        if not (param.is_meta or bool(param.isfinite().all())):
            raise ValueError(f"`{name}` holds NaN or infinity: load a model without.")
        width = param.shape[target.input_dim]
        if n_of_m is not None and width % n_of_m[1]:
            raise ValueError(
                f"`{name}` has {width} input features, which groups of {n_of_m[1]} do not divide. "
                f"Leave it out: `ignore=[{name!r}]`."
            )


def check_experts(batches: Sequence[Batch], selection: Selection) -> None:
    """Raises ValueError for experts whose inputs cannot be told apart."""
    stacked = [name for name, target in selection.targets.items() if target.stacked]
    for name in stacked:
        if selection.targets[name].input_dim == -2:
            raise ValueError(
                f"`{name}` holds experts as (in, out), whose inputs cannot be seen: leave it out by "
                f"`ignore=[{name!r}]`, or choose a method that needs no calibration."
            )
    for index, batch in enumerate(batches):
        if stacked and padding_mask(batch, "attention_mask") is not None:
            raise ValueError(
                f"calibration batch {index} has padding, which cannot be told apart inside the experts "
                f"of `{stacked[0]}`: give full rows, or leave the experts out with `ignore`."
            )


def check_seen(name: str, seen: Sequence[Seen]) -> None:
    if any(inputs.total is not None and not inputs.total.isfinite().all() for inputs in seen):
        raise ValueError(
            f"the inputs of `{name}` are NaN or infinite. If the model is in float16, load it "
            "in bfloat16 or float32."
        )
    unseen = [expert for expert, inputs in enumerate(seen) if not inputs.positions]
    if len(unseen) == len(seen):
        raise ValueError(
            f"the inputs of `{name}` cannot be seen: it is used by other means than a Linear, a "
            f"Conv1D or `nn.functional.linear`. Leave it out: `ignore=[{name!r}]`."
        )
    if unseen:
        logger.warning(
            f"`{name}`: no position of the calibration is routed to experts {unseen}; all of "
            "their inputs count alike. More calibration reaches more experts."
        )
