"""Saving what was trained on integer grids, as files that plain `from_pretrained` loads."""

from __future__ import annotations

import importlib.util
import os
import re
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from hf_compress.quantization.grids import Grid, GroupSize, Scheme, dequantize, grouped, quantize

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationConfig

FORMATS = ("compressed-tensors", "dense")


@torch.no_grad()
def save_quantized(
    model: PreTrainedModel,
    folder: str | os.PathLike[str],
    *,
    grids: Mapping[str, Grid],
    format: str = "compressed-tensors",
) -> None:
    """Writes `model`, whose weights were trained on `grids`, so that it loads without this package.

    Nothing is rounded: each of these weights is saved as its codes and the scales of its training, and
    is the same when loaded in the same dtype. All others are saved as they are, and tied ones once.
    The weights of `model` stay as they are. Of several processes call it in one.

    grids: by the name of the weight, as `QuantizationCallback.grids` after training.
    format:
        "compressed-tensors": transformers reads it where that package is installed. Symmetric weights
            become `pack-quantized`, of `bits` bits each. Those with a zero point become
            `int-quantized`, of 8 bits each whatever `bits` is: transformers does not load them packed.
        "dense": plain `save_pretrained`, floats on the grid.

    Small is the file, not the loaded model: compressed-tensors makes its weights float at the first
    forward, and saves floats after that, so copy or push `folder` itself. To train such a model on,
    load it with `quantization_config=CompressedTensorsConfig(dequantize=True)`.

    Raises ValueError before anything is written: for another `format`, no `grids`, weights that `model`
    does not have, that are not in a Linear layer, are shards, shared, not on their grid or on grids of
    several kinds, and for a model that is quantized already. TypeError for what is no transformers
    model, ImportError without compressed-tensors.
    """
    if format not in FORMATS:
        raise ValueError(f"`format` is {format!r}; allowed are {', '.join(map(repr, FORMATS))}.")
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"`model` is a {type(model).__name__}: pass the transformers model itself, such as "
            "`trainer.model`, its adapters merged."
        )
    if format == "dense":
        model.save_pretrained(folder)
        return
    if importlib.util.find_spec("compressed_tensors") is None:
        raise ImportError(
            'format "compressed-tensors" needs the package of this name: '
            'pip install "hf-compress[quantization]". Or pass `format="dense"`.'
        )
    from compressed_tensors.compressors import ModelCompressor

    _check(model, grids)
    scheme = _scheme(model, grids)
    tensors = model.state_dict()
    for name, grid in grids.items():
        layer = name.rpartition(".")[0]
        for key, value in _serialized(name, tensors.pop(name), grid, scheme).items():
            tensors[f"{layer}.{key}"] = value
    model.save_pretrained(folder, state_dict=tensors)
    ModelCompressor(quantization_config=_config(model, grids, scheme)).update_config(os.fspath(folder))


def _check(model: PreTrainedModel, grids: Mapping[str, Grid]) -> None:
    if not grids:
        raise ValueError("`grids` is empty: pass those of a QuantizationCallback that has trained.")
    if hasattr(model.config, "quantization_config"):
        raise ValueError("the model is quantized already: copy the folder that it was loaded from.")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    owners = Counter(parameters.values())
    for name in grids:
        if name not in parameters:
            raise ValueError(
                f"{type(model).__name__} has no {name}: pass the model that was trained, not a part "
                "of it."
            )
        param, module = parameters[name], model.get_submodule(name.rpartition(".")[0])
        reason = None
        if not isinstance(module, nn.Linear):
            reason = f"in a {type(module).__name__}, and compressed-tensors packs Linear layers only"
        elif isinstance(param, DTensor):
            reason = "sharded, and so is its grid"
        elif owners[param] > 1:
            reason = "shared with another layer"
        if reason is not None:
            raise ValueError(
                f'{name} is {reason}: pass `format="dense"`, or train with it left out by `ignore`.'
            )


def _scheme(model: PreTrainedModel, grids: Mapping[str, Grid]) -> Scheme:
    """The bits, group size and symmetry that all grids have in common."""
    sizes = {name: _group_size(name, model.get_parameter(name), grid) for name, grid in grids.items()}
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
        # The formats allow it, but transformers dequantizes all layers by the first scheme it finds.
        raise ValueError(
            f"`grids` are of {len(kinds)} kinds ({'; '.join(kinds)}), and must be of one: pass "
            '`format="dense"`.'
        )
    return schemes.pop()


def _group_size(name: str, weight: Tensor, grid: Grid) -> GroupSize:
    """How many inputs of `weight`, (out, in), share a scale."""
    (outputs, inputs), shape = weight.shape, tuple(grid.scale.shape)
    if shape == (1, 1):
        return "tensor"
    if len(shape) != 2 or shape[0] != outputs or inputs % shape[1]:
        raise ValueError(
            f"{name} is {outputs}x{inputs}, and its grid has scales of shape {shape}: pass the grids "
            "of this model's training."
        )
    return None if shape[1] == 1 else inputs // shape[1]


def _serialized(name: str, weight: Tensor, grid: Grid, scheme: Scheme) -> dict[str, Tensor]:
    """What compressed-tensors keeps of a layer in place of `weight`."""
    from compressed_tensors.compressors import pack_to_int32

    groups = grouped(weight.contiguous(), input_dim=1, group_size=scheme.group_size)
    codes = quantize(groups, grid)
    if not dequantize(codes, grid).equal(groups):
        raise ValueError(
            f"{name} is not on its grid: something changed it after the training. Load the last "
            "checkpoint, which is, or train again."
        )
    codes = codes.view(weight.shape)
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
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus

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
