"""Trained weights as the matrices that files of integers hold, each under a name of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION

from hf_compress.quantization.codes import codes_of
from hf_compress.quantization.grids import Grid
from hf_compress.targets import input_dim

_WEIGHT = ".weight"


@dataclass(frozen=True)
class FileLayer:
    """The codes of one matrix as int8, the grid of its groups, and the name of its layer in files."""

    name: str
    codes: Tensor
    grid: Grid


def file_layers(model: PreTrainedModel, name: str, weight: Tensor, grid: Grid) -> list[FileLayer]:
    """The layers that files hold for the weight `name` of `model`: of experts, which are stacked in the
    model only, one for each projection of each expert.

    Raises ValueError where it is not on `grid`.
    """
    dim = input_dim(model.get_submodule(name.rpartition(".")[0]))
    codes = codes_of(name, weight, grid, input_dim=dim)
    if dim >= 0:
        return [FileLayer(name.removesuffix(_WEIGHT), codes, grid)]
    # What is stacked in the model is split as a save would split it, scales like codes.
    scales = grid.scale.expand(-1, codes.shape[1], -1)
    split_scales = revert_weight_conversion(model, {name: scales})
    return [
        FileLayer(
            stored.removesuffix(_WEIGHT),
            part.contiguous(),
            replace(grid, scale=_as_one(split_scales[stored], grid)),
        )
        for stored, part in revert_weight_conversion(model, {name: codes}).items()
    ]


def check_layers(
    model: PreTrainedModel, grids: Mapping[str, Grid], input_grids: Mapping[str, Grid]
) -> None:
    """Raises ValueError for weights that transformers would not load from compressed-tensors, or not as
    they were trained."""
    conv1d = [name for name in grids if isinstance(_owner(model, name), Conv1D)]
    if conv1d and len(conv1d) < len(grids):
        other = next(name for name in grids if name not in conv1d)
        raise ValueError(
            f"{conv1d[0]} is in a Conv1D and {other} is not, and the file can hold one of both: pass "
            '`format="dense"`, or train with one of them left out by `ignore`.'
        )
    if conv1d and input_grids:
        raise ValueError(
            f"{conv1d[0]} is in a Conv1D, whose inputs are floats in a loaded model: leave "
            "`input_grids` out."
        )
    experts = [name for name, param in model.named_parameters() if _is_experts(model, name, param)]
    for name in experts:
        _check_experts(model, name, grids)
    for name in grids:
        if not (name in experts or isinstance(_owner(model, name), nn.Linear | Conv1D)):
            raise ValueError(
                f"{name} is in a {type(_owner(model, name)).__name__}, and compressed-tensors packs "
                'Linear, Conv1D and experts only: pass `format="dense"`, or train with it left out by '
                "`ignore`."
            )


def _check_experts(model: PreTrainedModel, name: str, grids: Mapping[str, Grid]) -> None:
    kind = type(_owner(model, name)).__name__
    if kind in MODULES_TO_PATCH_FOR_QUANTIZATION:
        raise ValueError(
            f"{name} is in a {kind}, which transformers does not load beside packed layers of "
            'compressed-tensors: pass `format="dense"`, or train with it left out by `ignore` and pass '
            '`format="torchao"`.'
        )
    stored = _stored_one_by_one(model, name)
    if name not in grids:
        if not stored:
            return
        raise ValueError(
            f"{name} was not trained on a grid, and transformers loads experts in floats beside packed "
            'layers from torchao only: pass `format="torchao"` or "dense", or train with the experts.'
        )
    packed = {f"{stored_name}_packed": tensor for stored_name, tensor in stored.items()}
    # A save renames what it is given, and these have the names of the files already.
    if not stored or revert_weight_conversion(model, packed).keys() != packed.keys():
        raise ValueError(
            f"{name} holds experts that the files of a {type(model).__name__} stack too, and "
            'compressed-tensors packs single ones: pass `format="dense"`, or train with it left out '
            "by `ignore`."
        )
    if grids[name].zero_point is not None:
        raise ValueError(
            f"{name} holds experts on a grid with zero points, which transformers does not load: pass "
            '`format="dense"`, or train with `symmetric=True`.'
        )


def _stored_one_by_one(model: PreTrainedModel, name: str) -> dict[str, Tensor]:
    """The experts of the weight `name` on the meta device, by their names in files; empty where these
    stack them too."""
    stored = revert_weight_conversion(model, {name: model.get_parameter(name).to("meta")})
    split = all(stored_name != name and stored_name.endswith(_WEIGHT) for stored_name in stored)
    return stored if split else {}


def _as_one(scale: Tensor, grid: Grid) -> Tensor:
    """The scales of one expert's projection; one scale where its matrix shared it."""
    return scale[:1].contiguous() if grid.scale.shape[-2:] == (1, 1) else scale.contiguous()


def _is_experts(model: PreTrainedModel, name: str, param: Tensor) -> bool:
    return "Experts" in type(_owner(model, name)).__name__ and param.dim() == 3


def _owner(model: PreTrainedModel, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])
