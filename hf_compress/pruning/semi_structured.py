"""2:4 weights on the sparse tensor cores of a GPU, where these turn out faster."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.sparse import to_sparse_semi_structured
from torch.utils.benchmark import Timer

from hf_compress.devices import has_sparse_kernels

_DTYPES = (torch.float16, torch.bfloat16)


@torch.no_grad()
def to_semi_structured_(
    model: nn.Module, inputs: Mapping[str, Tensor]
) -> dict[str, tuple[float, float]]:
    """Stores 2:4 weights (papers/2104.08378) as torch's semi-structured tensors, where that is faster.

    Each linear layer whose weight has two zeros in every four along its inputs, in fp16 or bf16, is
    timed in both forms, on what it gets from one forward pass of `inputs`; it keeps the faster. The
    gain depends on the batch: at batch 1 the sparse form is often slower. For inference only: save
    the model before.

    Returns seconds (dense, sparse) for each layer that was timed.

    Raises RuntimeError away from CUDA GPUs of compute capability 8.0 and higher, ValueError when no
    layer qualifies.
    """
    device = next(model.parameters()).device
    if not has_sparse_kernels(device):
        raise RuntimeError(
            f"The model is on {device}, and torch has 2:4 kernels for CUDA GPUs of compute "
            "capability 8.0 and higher only. Elsewhere a zero takes the time of any other number."
        )
    layers = {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and module.weight.dtype in _DTYPES and _is_2_of_4(module.weight)
    }
    if not layers:
        raise ValueError(
            "`model` has no Linear in fp16 or bf16 with two zeros in every four inputs: prune it by "
            "pattern='2:4', and load it in bf16."
        )
    seconds = {}
    for name, features in _seen_by(layers, model, inputs).items():
        layer = layers[name]
        try:
            sparse = to_sparse_semi_structured(layer.weight)
        except RuntimeError:  # a size that the kernels do not take
            continue
        times = _time(features, layer.weight, layer.bias), _time(features, sparse, layer.bias)
        if times[1] < times[0]:
            layer.weight = nn.Parameter(sparse, requires_grad=False)
        seconds[name] = times
    return seconds


def _is_2_of_4(weight: Tensor) -> bool:
    if weight.shape[1] % 4:
        return False
    return bool(((weight.reshape(-1, 4) != 0).sum(1) <= 2).all())


def _seen_by(
    layers: Mapping[str, nn.Module], model: nn.Module, inputs: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What each of `layers` that takes part gets in one forward pass."""
    seen: dict[str, Tensor] = {}
    names = {layer: name for name, layer in layers.items()}

    def record(layer: nn.Module, args: tuple[Tensor]) -> None:
        seen[names[layer]] = args[0]

    hooks = [layer.register_forward_pre_hook(record) for layer in layers.values()]
    try:
        model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _time(features: Tensor, weight: Tensor, bias: Tensor | None) -> float:
    timer = Timer(
        "linear(features, weight, bias)",
        globals={"linear": linear, "features": features, "weight": weight, "bias": bias},
    )
    return timer.blocked_autorange(min_run_time=0.05).median
