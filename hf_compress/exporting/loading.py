"""Compressed models as floats, with the grids that their integers lie on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from hf_compress.publishing.integers import reopen
from hf_compress.quantization.grids import Grid

_SCALE = ".weight_scale"


def load_floats(folder: Path) -> tuple[PreTrainedModel, dict[str, Grid]]:
    """The model in `folder` as floats of 32 bits, on the CPU, and by the names of its weights the grids
    on which compressed-tensors holds them; none where a layer there is no Linear of the model, where
    they are of several kinds, and where its floats are short, which are rounded once more.

    Raises FileNotFoundError where there is no model, ValueError for a class that transformers does not
    have, and weights that stay packed when they are loaded.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json: pass the folder of a saved model.")
    config: Any = AutoConfig.from_pretrained(folder)
    name = (config.architectures or [""])[0]
    kind = getattr(transformers, name, None)
    if kind is None:
        raise ValueError(f"transformers has no {name!r}: only its own classes can be exported.")
    settings: Mapping[str, Any] = _as_dict(getattr(config, "quantization_config", None))
    method = settings.get("quant_method", "")
    if method not in ("", "compressed-tensors"):
        raise ValueError(
            f"{folder} is packed by {method}, which no exporter reads: export the model that it was "
            "made from, or save the training with format='compressed-tensors' or 'dense'."
        )
    model = reopen(folder, kind, method)
    exact = method and model.dtype == torch.float32
    return model.float(), _grids(folder, model, settings) if exact else {}


def _grids(folder: Path, model: PreTrainedModel, settings: Mapping[str, Any]) -> dict[str, Grid]:
    groups = list(settings["config_groups"].values())
    if len(groups) != 1:
        return {}
    bits = int(groups[0]["weights"]["num_bits"])
    stored: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  # it is no dict
                if key.endswith((_SCALE, ".weight_zero_point")):
                    stored[key] = file.get_tensor(key)
    layers = dict(model.named_modules())
    grids = {}
    for key, scale in stored.items():
        if not key.endswith(_SCALE):
            continue
        name = key.removesuffix(_SCALE)
        if not isinstance(layers.get(name), nn.Linear):
            return {}
        zero = stored.get(f"{name}.weight_zero_point")
        whole = scale.numel() == 1
        grids[f"{name}.weight"] = Grid(
            scale=scale.reshape(1, 1) if whole else scale.float(),
            zero_point=None if zero is None or not zero.any() else zero.float().reshape(scale.shape),
            bits=bits,
        )
    return grids


def _as_dict(settings: Any) -> Mapping[str, Any]:
    return settings if isinstance(settings, dict) else settings.to_dict() if settings else {}
