"""Trained integers as compressed-tensors stores them."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from compressed_tensors.compressors import ModelCompressor, pack_to_int32
from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_compress.quantization.codes import group_size_of
from hf_compress.quantization.file_layers import FileLayer, file_layers
from hf_compress.quantization.grids import Grid
from hf_compress.quantization.schemes import Scheme
from hf_compress.targets import input_dim


def save_compressed_tensors(
    model: PreTrainedModel,
    folder: str | os.PathLike[str],
    grids: Mapping[str, Grid],
    input_grids: Mapping[str, Grid],
) -> None:
    """See `hf_compress.quantization.export.save_quantized`."""
    scheme, inputs = _scheme(model, grids), _input_scheme(input_grids)
    conv1d = any(isinstance(model.get_submodule(n.rpartition(".")[0]), Conv1D) for n in grids)
    packed = scheme.symmetric and inputs is None
    tensors = model.state_dict()
    for name, grid in grids.items():
        for layer in file_layers(model, name, tensors.pop(name), grid):
            serialized = _serialized(layer, scheme, packed=packed, conv1d=conv1d)
            if name in input_grids:
                serialized |= _serialized_inputs(input_grids[name])
            tensors |= {f"{layer.name}.{key}": value for key, value in serialized.items()}
    model.save_pretrained(folder, state_dict=tensors)
    config = _config(model, grids, scheme, inputs, packed=packed, conv1d=conv1d)
    ModelCompressor(quantization_config=config).update_config(os.fspath(folder))
    if conv1d:
        _dequantize_when_loaded(Path(folder))


def _scheme(model: PreTrainedModel, grids: Mapping[str, Grid]) -> Scheme:
    """The bits, group size and symmetry that all grids have in common."""
    sizes, widths = {}, {}
    conv1d = False
    for name, grid in grids.items():
        weight, owner = model.get_parameter(name), model.get_submodule(name.rpartition(".")[0])
        dim = input_dim(owner)
        sizes[name] = group_size_of(name, weight, grid, input_dim=dim)
        widths[name] = weight.shape[dim]
        conv1d = conv1d or isinstance(owner, Conv1D)
    for name, size in sizes.items():
        # Where a layer is as wide as the groups of the others, all of its inputs are one of them.
        if size is None and widths[name] in sizes.values():
            sizes[name] = widths[name]
    if conv1d and {*sizes.values()} == {None}:
        # A Conv1D is stored in blocks, of one size in all layers: what divides all of them.
        sizes = dict.fromkeys(sizes, math.gcd(*widths.values()))
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


def _serialized(layer: FileLayer, scheme: Scheme, *, packed: bool, conv1d: bool) -> dict[str, Tensor]:
    """What compressed-tensors keeps of a layer in place of its weight."""

    def shaped(tensor: Tensor) -> Tensor:
        if scheme.group_size == "tensor":
            return tensor.view(1)
        if conv1d:
            blocks = len(layer.codes) // cast(int, scheme.group_size)
            return tensor.repeat_interleave(blocks // len(tensor), 0)
        return tensor

    scale = shaped(layer.grid.scale)
    if packed:
        return {
            "weight_packed": pack_to_int32(layer.codes, layer.grid.bits),
            "weight_scale": scale,
            "weight_shape": torch.tensor(layer.codes.shape),
        }
    if layer.grid.zero_point is None:
        return {"weight": layer.codes, "weight_scale": scale}
    zero_point = shaped(layer.grid.zero_point).to(torch.int8)
    return {"weight": layer.codes, "weight_scale": scale, "weight_zero_point": zero_point}


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
    conv1d: bool,
) -> QuantizationConfig:
    weights = {"num_bits": scheme.bits, "symmetric": scheme.symmetric} | _strategy(scheme, conv1d)
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


def _strategy(scheme: Scheme, conv1d: bool) -> dict[str, Any]:
    size = scheme.group_size
    if size == "tensor":
        return {"strategy": "tensor"}
    if conv1d:
        return {"strategy": "block", "block_structure": [size, 1]}
    return {"strategy": "group" if size else "channel", "group_size": size}


def _dequantize_when_loaded(folder: Path) -> None:
    """What is no Linear layer is read as floats, without a layer of compressed-tensors' own."""
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["quantization_config"]["dequantize"] = True
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
