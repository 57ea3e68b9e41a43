"""Saving what was trained on integer grids, as files that plain `from_pretrained` loads."""

from __future__ import annotations

import importlib.util
import os
from collections import Counter
from collections.abc import Mapping

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from hf_compress.quantization.file_layers import check_layers
from hf_compress.quantization.grids import Grid

FORMATS = ("compressed-tensors", "torchao", "dense")


@torch.no_grad()
def save_quantized(
    model: PreTrainedModel,
    folder: str | os.PathLike[str],
    *,
    grids: Mapping[str, Grid],
    input_grids: Mapping[str, Grid] | None = None,
    format: str = "compressed-tensors",
) -> None:
    """Writes `model`, whose weights were trained on `grids`, so that it loads without this package.

    Nothing is rounded: each of these weights is saved as its codes and the scales of its training, and
    is the same when loaded in the same dtype. All others are saved as they are, and tied ones once.
    The weights of `model` stay as they are. Of several processes call it in one.

    grids: by the name of the weight, as `QuantizationCallback.grids` after training, or what
        `quantize_oneshot_` returns.
    input_grids: fixed grids of the inputs of the same layers, as `QuantizationCallback.input_grids` or
        what `calibrated_grids` finds. The loaded model rounds its inputs on them, as the training did.
        Without them its inputs are floats, also where they were trained on a grid for each token.
    format:
        "compressed-tensors": transformers reads it where that package is installed. Symmetric weights
            become `pack-quantized`, of `bits` bits each. Those with a zero point, which transformers
            does not load packed, or with `input_grids` become `int-quantized`, of 8 bits each whatever
            `bits` is. The loaded model has the weights as floats from its first forward on, those of a
            Conv1D or of experts from its loading on. Experts that were stacked in the model only, as
            Mixtral's, are packed one by one, as its files have them.
        "torchao": transformers reads it where that package is installed, as the class it was saved
            from, not its backbone alone. A byte for each weight whatever `bits` is, in memory too, and
            grids of several kinds in one model. Symmetric weights of 8 bits become `Int8Tensor`, whose
            product multiplies by the scale last: with one scale for each output feature logits differ
            in the last bits. All others become `IntxUnpackedToInt8Tensor`, and logits are equal.
        "dense": plain `save_pretrained`, floats on the grid.

    A loaded model of integers does not save itself as one again: compressed-tensors saves floats, and
    transformers 5.23 raises NotImplementedError for torchao. Copy or push `folder` itself. To train a
    compressed-tensors model on, load it with
    `quantization_config=CompressedTensorsConfig(dequantize=True)`, which leaves its inputs floats.

    Raises ValueError before anything is written: for another `format`, no `grids`, weights that `model`
    does not have, are shards, shared or not on their grid, and a model that is quantized already. For
    "torchao", weights in other layers than Linear ones. For "compressed-tensors", grids of several
    kinds, Conv1D layers beside others, experts that files stack too (GPT-OSS, Llama 4) or on grids with
    zero points, and experts left as floats. For `input_grids` of other layers, of several widths, of
    Conv1D layers, or with another format, which has no place for them.
    TypeError for what is no transformers model, ImportError without the package of the format.
    """
    if format not in FORMATS:
        raise ValueError(f"`format` is {format!r}; allowed are {', '.join(map(repr, FORMATS))}.")
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"`model` is a {type(model).__name__}: pass the transformers model itself, such as "
            "`trainer.model`, its adapters merged."
        )
    if input_grids and format != "compressed-tensors":
        raise ValueError(
            f'format "{format}" has no place for `input_grids`: pass `format="compressed-tensors"`, or '
            "leave them out, and the loaded model has float inputs."
        )
    if format == "dense":
        model.save_pretrained(folder)
        return
    if importlib.util.find_spec(format.replace("-", "_")) is None:
        raise ImportError(
            f'format "{format}" needs the package of this name: '
            'pip install "hf-compress[quantization]". Or pass `format="dense"`.'
        )
    _check(model, grids, format)
    # Not above: each imports the package of its format.
    if format == "torchao":
        from hf_compress.quantization.to_torchao import save_torchao

        save_torchao(model, folder, grids)
    else:
        from hf_compress.quantization.to_compressed_tensors import save_compressed_tensors

        check_layers(model, grids, input_grids or {})
        _check_inputs(grids, input_grids or {})
        save_compressed_tensors(model, folder, grids, input_grids or {})


def _check(model: PreTrainedModel, grids: Mapping[str, Grid], format: str) -> None:
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
        if format == "torchao" and not isinstance(module, nn.Linear):
            raise ValueError(
                f"{name} is in a {type(module).__name__}, and torchao packs Linear layers only: pass "
                '`format="compressed-tensors"` or "dense", or train with it left out by `ignore`.'
            )
        reason = None
        if isinstance(param, DTensor):
            reason = "sharded, and so is its grid"
        elif owners[param] > 1:
            reason = "shared with another layer"
        if reason is not None:
            raise ValueError(
                f'{name} is {reason}: pass `format="dense"`, or train with it left out by `ignore`.'
            )


def _check_inputs(grids: Mapping[str, Grid], input_grids: Mapping[str, Grid]) -> None:
    if not input_grids:
        return
    if other := grids.keys() ^ input_grids.keys():
        raise ValueError(
            f"{sorted(other)[0]} is in one of `grids` and `input_grids` only: pass those of the same "
            "training."
        )
    for name, grid in input_grids.items():
        if grid.scale.numel() != 1 or grid.zero_point is None:
            raise ValueError(
                f"`input_grids` has scales of shape {tuple(grid.scale.shape)} for {name}, and needs "
                "one scale and one zero point: pass `QuantizationCallback.input_grids`."
            )
