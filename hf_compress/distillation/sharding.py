"""Teachers cut into the shards of FSDP2, as Accelerate cuts their student."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from accelerate.utils import fsdp2_prepare_model
from torch import nn


def shard_(model: nn.Module, accelerator: Accelerator) -> None:
    """Cut a frozen `model` into shards, in place: each process holds its part of every layer, and of
    whole layers only the one that runs. Weights that rank 0 alone has read reach the others.

    One in few bits, or spread over devices already, stays whole on each process.
    Raises ValueError where the layers that the settings of FSDP name are not in `model`.
    """
    quantized = getattr(model, "quantization_method", None) is not None
    if quantized or hasattr(model, "hf_device_map"):
        return
    try:
        cut: Any = fsdp2_prepare_model(accelerator, model)
    except ValueError as error:
        raise ValueError(
            f"the teacher, {type(model).__name__}, cannot be cut into shards: {error} Leave out the "
            "names of layers in the settings of FSDP, so that each model says its own."
        ) from error
    # No backward pass, for which some would be kept whole, follows on a teacher's forward.
    cut.set_reshard_after_forward(True)
