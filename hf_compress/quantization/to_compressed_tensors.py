"""Trained integers as compressed-tensors stores them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

import torch
from compressed_tensors.compressors import ModelCompressor, pack_to_int32
from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_compress.quantization.codes import codes_of, group_size_of
from hf_compress.quantization.grids import Grid, Scheme


def save_compressed_tensors(
    model: PreTrainedModel, folder: str | os.PathLike[str], grids: Mapping[str, Grid]
) -> None:
    """See `hf_compress.quantization.export.save_quantized`."""
    scheme = _scheme(model, grids)
    tensors = model.state_dict()
    for name, grid in grids.items():
        layer = name.rpartition(".")[0]
        for key, value in _serialized(name, tensors.pop(name), grid, scheme).items():
            tensors[f"{layer}.{key}"] = value
    model.save_pretrained(folder, state_dict=tensors)
    ModelCompressor(quantization_config=_config(model, grids, scheme)).update_config(os.fspath(folder))


def _scheme(model: PreTrainedModel, grids: Mapping[str, Grid]) -> Scheme:
    """The bits, group size and symmetry that all grids have in common."""
    sizes = {name: group_size_of(name, model.get_parameter(name), grid) for name, grid in grids.items()}
    for name, size in sizes.items():
        # Where a layer is as wide as the groups of the others, all of its inputs are one of them.
        inputs = model.get_parameter(name).shape[1]
        if size is None and inputs in sizes.values():
            sizes[name] = inputs
    schemes = {
        Scheme(bits=grid.bits, group_size=sizes[name], symmetric=grid.zero_point is None)
        for name, grid in grids.items()
    }
    if len(schemes) > 1:
        kinds = sorted(
            f"{s.bits} bits, group_size={s.group_size!r}, symmetric={s.symmetric}" for s in schemes
        )
        # The format allows it, but transformers dequantizes all layers by the first scheme it finds.
        raise ValueError(
            f"`grids` are of {len(kinds)} kinds ({'; '.join(kinds)}), and must be of one: pass "
            '`format="torchao"` or "dense".'
        )
    return schemes.pop()


def _serialized(name: str, weight: Tensor, grid: Grid, scheme: Scheme) -> dict[str, Tensor]:
    """What compressed-tensors keeps of a layer in place of `weight`."""
    codes = codes_of(name, weight, grid)
    shape = (1,) if scheme.group_size == "tensor" else grid.scale.shape
    scale = grid.scale.view(shape)
    if grid.zero_point is not None:
        zero_point = grid.zero_point.view(shape).to(torch.int8)
        return {"weight": codes, "weight_scale": scale, "weight_zero_point": zero_point}
    return {
        "weight_packed": pack_to_int32(codes, grid.bits),
        "weight_scale": scale,
        "weight_shape": torch.tensor(weight.shape),
    }


def _config(model: PreTrainedModel, grids: Mapping[str, Grid], scheme: Scheme) -> QuantizationConfig:
    size = scheme.group_size
    weights = {
        "num_bits": scheme.bits,
        "symmetric": scheme.symmetric,
        "strategy": "tensor" if size == "tensor" else "group" if size else "channel",
        "group_size": size if isinstance(size, int) else None,
    }
    # The name of the backbone is missing where it is loaded alone, by AutoModel.
    prefix = f"{model.base_model_prefix}."
    kept = [
        f"re:({re.escape(prefix)})?{re.escape(name.removeprefix(prefix))}$"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and f"{name}.weight" not in grids
    ]
    form = "pack-quantized" if scheme.symmetric else "int-quantized"
    return QuantizationConfig.model_validate(
        {
            # In the group too: without it the loader takes all integers to be packed.
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "format": form}},
            "format": form,
            "quantization_status": QuantizationStatus.COMPRESSED,
            "ignore": kept,
        }
    )
