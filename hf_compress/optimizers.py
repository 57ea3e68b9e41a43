"""Optimizers and parameters that can be constrained; of others, why not and what to do."""

from __future__ import annotations

from collections.abc import Mapping

from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper, DummyOptim
from torch import nn
from torch.distributed.fsdp import FlatParameter
from torch.optim import Optimizer
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer


def torch_optimizer(optimizer: object) -> Optimizer:
    """The torch optimizer under Accelerate's wrapper; ValueError where there is none to hook."""
    if isinstance(optimizer, (DeepSpeedOptimizerWrapper, DummyOptim)):
        raise ValueError(
            "under DeepSpeed the engine steps inside the backward pass, on its own copies of the "
            "weights, so they cannot be constrained: use DDP or FSDP2."
        )
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    if isinstance(optimizer, LayerWiseDummyOptimizer):
        raise ValueError(
            "a layer-wise optimizer steps inside the backward pass, where weights cannot be "
            "constrained: choose an `optim` without 'layerwise'."
        )
    if not isinstance(optimizer, Optimizer):
        raise ValueError(
            f"{type(optimizer).__name__} is not a torch optimizer: pass a torch.optim.Optimizer, or "
            "one that Accelerate prepared."
        )
    if callable(getattr(optimizer, "eval", None)):
        raise ValueError(
            f"{type(optimizer).__name__} swaps the weights between training and evaluation, which "
            "would undo the constraint: choose an optimizer that is not schedule-free."
        )
    return optimizer


def check_parameters(optimizer: Optimizer, parameters: Mapping[str, nn.Parameter]) -> None:
    """Raises ValueError where one of `parameters` cannot be constrained on this optimizer."""
    if not parameters:
        raise ValueError("no parameters to constrain: pass at least one, by name.")
    trained = {param for group in optimizer.param_groups for param in group["params"]}
    for name, param in parameters.items():
        if isinstance(param, FlatParameter):
            raise ValueError(f"{name} is a flat parameter of FSDP1: use FSDP2 (`fsdp_version: 2`).")
        if not param.is_floating_point():
            raise ValueError(
                f"{name} is packed as {param.dtype}: integers cannot be constrained. Load the model "
                "without quantization."
            )
        if param not in trained:
            raise ValueError(
                f"{name} is not trained by the optimizer (frozen, or of another model): leave it "
                "out, or pass it to the optimizer."
            )
