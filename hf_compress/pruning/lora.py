"""A LoRA merged into a sparse model that stays sparse, over a float or a quantized base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_compress.quantization.guard import guard_cpu_kernels_
from hf_compress.quantization.merging import check_peft, dequantize_, is_bitsandbytes

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass(frozen=True)
class Merged:
    """The plain model, and the zeros before and after in each weight that had a LoRA, by its name."""

    model: PreTrainedModel
    zeros: dict[str, tuple[int, int]]

    @property
    def zeros_before(self) -> int:
        return sum(before for before, _ in self.zeros.values())

    @property
    def zeros_after(self) -> int:
        return sum(after for _, after in self.zeros.values())


@torch.no_grad()
def merge_under_mask_(model: PeftModel, pattern: Mapping[str, Tensor] | None = None) -> Merged:
    """Merges the active LoRAs (papers/2106.09685) into their weights, where these are not zero.

    `merge_and_unload` adds a dense matrix to each weight, and every zero is lost. Here
    `weight += (weight != 0) * delta`: no zero is lost, and what the LoRA learnt at the zeros is.
    Evaluate the model again after it.

    A base in 8 or 4 bit (bitsandbytes) becomes float first, in the dtype of its other weights. Zeros
    survive both formats exactly; but weights close to zero become zero in them, a tenth of them in
    4 bit, and without `pattern` those stay zero too.

    pattern: tensors by name whose zeros are the ones to keep, by default the base's own: the state
        dict or the file of the sparse model as it was before it was quantized.

    The model is changed: its base becomes `Merged.model`, without adapters and with what
    `modules_to_save` trained. It saves and loads plainly.

    Raises TypeError for what is no PeftModel; ValueError for other adapters than plain LoRAs of linear
    layers, for ones that are merged already, for a base in another quantized format, for a float one
    without zeros, and for a `pattern` that lacks a weight. Nothing is changed then.
    """
    check_peft(model)
    layers = _lora_layers(model)
    base: Any = model.get_base_model()
    quantized = _check_base(base, layers)
    if pattern is not None:
        _check_pattern(pattern, layers)
    base = model.unload()
    if quantized:
        base = dequantize_(base)
    zeros = {}
    for name, layer in layers.items():
        owner = base.get_submodule(name)
        weight = owner.weight
        delta = sum(layer.get_delta_weight(adapter) for adapter in _active(layer))
        if quantized and isinstance(owner, Conv1D):
            delta = delta.T  # PEFT saw the packed layer, which lies as a Linear does
        kept = weight != 0 if pattern is None else pattern[f"{name}.weight"].to(weight.device) != 0
        before = int((weight == 0).sum())
        weight.copy_((weight + delta).masked_fill_(~kept, 0))
        zeros[f"{name}.weight"] = (before, int((weight == 0).sum()))
    return Merged(base, zeros)


def _lora_layers(model: PeftModel) -> dict[str, Any]:
    """The layers with a LoRA by their name in the base. Raises where one cannot be merged."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = {}
    for name, layer in model.get_base_model().named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        if not isinstance(layer, LoraLayer) or not isinstance(
            layer.get_base_layer(), (nn.Linear, Conv1D)
        ):
            raise ValueError(
                f"{name} has a {type(layer).__name__} adapter: only LoRAs of linear layers merge here."
            )
        if layer.merged:
            raise ValueError(f"{name} is merged already: call `model.unmerge_adapter()` first.")
        if layer.lora_variant or any(layer.lora_bias.values()):
            raise ValueError(
                f"{name} has DoRA, a bias or another variant of LoRA: only plain LoRA merges here."
            )
        layers[name] = layer
    if not layers:
        raise ValueError("`model` has no LoRA layer.")
    return layers


def _check_base(base: Any, layers: Mapping[str, Any]) -> bool:
    """Whether the base is quantized. Raises where it cannot be merged into."""
    if is_bitsandbytes(base):
        guard_cpu_kernels_(base)
        return True
    if hasattr(base.config, "quantization_config"):
        raise ValueError("The base is quantized, and not by bitsandbytes: load it in float.")
    if all(layer.get_base_layer().weight.all() for layer in layers.values()):
        raise ValueError("The base has no zero under a LoRA: `merge_and_unload` does as well.")
    return False


def _check_pattern(pattern: Mapping[str, Tensor], layers: Mapping[str, Any]) -> None:
    for name, layer in layers.items():
        weight = pattern.get(f"{name}.weight")
        if weight is None or weight.numel() != layer.in_features * layer.out_features:
            raise ValueError(
                f"`pattern` lacks {name}.weight, or has it in another size: pass the weights of the "
                "sparse model, by the names that `state_dict` gives them."
            )


def _active(layer: Any) -> list[str]:
    return [name for name in layer.active_adapters if name in layer.lora_A]
