"""Trained integers as tensors of torchao."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchao.core.config import AOBaseConfig
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
from torchao.quantization import (
    Int8Tensor,
    Int8WeightOnlyConfig,
    IntxUnpackedToInt8Tensor,
    IntxWeightOnlyConfig,
)
from transformers import PreTrainedModel, TorchAoConfig
from transformers.quantizers.quantizer_torchao import TorchAoHfQuantizer

from hf_compress.quantization.codes import codes_of
from hf_compress.quantization.grids import Grid


class _Saver(TorchAoHfQuantizer):
    """Lets `save_pretrained` write `tensors`, some of them torchao's, in place of its model's."""

    def __init__(self, config: TorchAoConfig, tensors: dict[str, Tensor]) -> None:
        super().__init__(config, pre_quantized=True)
        self._tensors = tensors

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict]:
        return flatten_tensor_state_dict(self._tensors)


def save_torchao(
    model: PreTrainedModel, folder: str | os.PathLike[str], grids: Mapping[str, Grid]
) -> None:
    """See `hf_compress.quantization.export.save_quantized`."""
    tensors = model.state_dict()
    for name, grid in grids.items():
        tensors[name] = _packed(name, tensors[name], grid)
    kept = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and f"{name}.weight" not in grids
    ]
    # A second model of the same modules, so that the given one does not become a quantized one.
    written: Any = copy.copy(model)
    written.config = copy.deepcopy(model.config)
    settings = TorchAoConfig(_config(grids), modules_to_not_convert=kept)
    written.config.quantization_config = settings
    written.hf_quantizer = _Saver(settings, tensors)
    written.save_pretrained(folder)


def _packed(name: str, weight: Tensor, grid: Grid) -> Tensor:
    codes = codes_of(name, weight, grid, input_dim=1)
    block = [size // groups for size, groups in zip(weight.shape, grid.scale.shape, strict=True)]
    if _is_int8(grid):
        return Int8Tensor(codes, grid.scale, block, weight.dtype)
    # Not the other of 8 bits too: its product with an input in floats leaves the zero point out.
    zero_point = torch.zeros_like(grid.scale) if grid.zero_point is None else grid.zero_point
    return IntxUnpackedToInt8Tensor(
        qdata=codes,
        scale=grid.scale,
        zero_point=zero_point.to(torch.int8),
        target_dtype=_integers(grid.bits),
        block_size=block,
        dtype=weight.dtype,
        activation_quantization=None,
    )


def _is_int8(grid: Grid) -> bool:
    return grid.bits == 8 and grid.zero_point is None


def _config(grids: Mapping[str, Grid]) -> AOBaseConfig:
    """What torchao calls the scheme; the file tells all of each tensor by itself."""
    if all(map(_is_int8, grids.values())):
        return Int8WeightOnlyConfig()
    return IntxWeightOnlyConfig(weight_dtype=_integers(max(grid.bits for grid in grids.values())))


def _integers(bits: int) -> torch.dtype:
    return getattr(torch, f"int{bits}")  # torch's type hints have those of fewer than 8 bits not yet
