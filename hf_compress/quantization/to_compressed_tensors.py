"""Trained integers as compressed-tensors stores them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any, cast

import torch
from compressed_tensors.compressors import ModelCompressor, pack_to_int32
from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_compress.quantization.codes import codes_of, group_size_of
from hf_compress.quantization.grids import Grid, Scheme


def save_compressed_tensors(
    model: PreTrainedModel,
    folder: str | os.PathLike[str],
    grids: Mapping[str, Grid],
    input_grids: Mapping[str, Grid],
) -> None:
    """See `hf_compress.quantization.export.save_quantized`."""
    scheme, inputs = _scheme(model, grids), _input_scheme(input_grids)
    packed = scheme.symmetric and inputs is None
    tensors = model.state_dict()
    for name, grid in grids.items():
        layer = name.rpartition(".")[0]
        serialized = _serialized(name, tensors.pop(name), grid, scheme, packed=packed)
        if name in input_grids:
            serialized |= _serialized_inputs(input_grids[name])
        for key, value in serialized.items():
            tensors[f"{layer}.{key}"] = value
    model.save_pretrained(folder, state_dict=tensors)
    config = _config(model, grids, scheme, inputs, packed=packed)
    ModelCompressor(quantization_config=config).update_config(os.fspath(folder))


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


def _input_scheme(grids: Mapping[str, Grid]) -> dict[str, Any] | None:
    """What the file tells of inputs on fixed grids."""
    widths = sorted({grid.bits for grid in grids.values()})
    if not widths:
        return None
    if len(widths) > 1:
        raise ValueError(
            f"`input_grids` have {widths} bits, and must have the same: pass those of one training."
        )
    return {"num_bits": widths[0], "symmetric": False, "strategy": "tensor", "dynamic": False}


def _serialized(
    name: str, weight: Tensor, grid: Grid, scheme: Scheme, *, packed: bool
) -> dict[str, Tensor]:
    """What compressed-tensors keeps of a layer in place of `weight`."""
    codes = codes_of(name, weight, grid)
    shape = (1,) if scheme.group_size == "tensor" else grid.scale.shape
    scale = grid.scale.view(shape)
    if packed:
        return {
            "weight_packed": pack_to_int32(codes, grid.bits),
            "weight_scale": scale,
            "weight_shape": torch.tensor(weight.shape),
        }
    if grid.zero_point is None:
        return {"weight": codes, "weight_scale": scale}
    zero_point = grid.zero_point.view(shape).to(torch.int8)
    return {"weight": codes, "weight_scale": scale, "weight_zero_point": zero_point}


def _serialized_inputs(grid: Grid) -> dict[str, Tensor]:
    zero_point = cast(Tensor, grid.zero_point)
    return {
        "input_scale": grid.scale.view(1),
        "input_zero_point": zero_point.view(1).to(torch.int8),
    }


def _config(
    model: PreTrainedModel,
    grids: Mapping[str, Grid],
    scheme: Scheme,
    inputs: dict[str, Any] | None,
    *,
    packed: bool,
) -> QuantizationConfig:
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
    form = "pack-quantized" if packed else "int-quantized"
    # The format in the group too: without it the loader takes all integers to be packed.
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "format": form}
    return QuantizationConfig.model_validate(
        {
            "config_groups": {"group_0": group},
            "format": form,
            "quantization_status": QuantizationStatus.COMPRESSED,
            "ignore": kept,
        }
    )
