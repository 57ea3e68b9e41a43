"""The stacks of layers of any transformers model: one, or an encoder's and a decoder's."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

_FIELDS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
_FIELDS_OF = {
    "encoder": ("encoder_layers", "num_encoder_layers", *_FIELDS),
    "decoder": ("decoder_layers", "num_decoder_layers", *_FIELDS),
}


@dataclass(frozen=True)
class Stack:
    """Layers in a row.

    name: "encoder" or "decoder" in an encoder-decoder; else "layers" where there is only one, or the
        path of its owner.
    path: of the list of layers. owner: path of the model inside whose output is the last hidden state.
    config, field: the config that counts the layers, and its field for that.
    """

    name: str
    path: str
    owner: str
    layers: nn.ModuleList
    config: PreTrainedConfig
    field: str


def find_stacks(model: PreTrainedModel) -> dict[str, Stack]:
    """The stacks of `model` by name, in its order: lists of modules as long as the config says, but
    for the convolutions before the layers of a speech model.

    Raises ValueError where there is none, or where two cannot be told apart.
    """
    found: list[Stack] = []
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{stack.path}.") for stack in found)
        if isinstance(module, nn.ModuleList) and not inside and not _only_convolves(module):
            stack = _stack(model, path, module)
            if stack is not None:
                found.append(stack)
    stacks = {stack.name: stack for stack in found}
    if not stacks or len(stacks) < len(found):
        raise ValueError(
            f"{type(model).__name__} has {len(found)} lists of layers as long as its config says"
            f"{''.join(f', {stack.path}' for stack in found)}: which are its stacks is not clear."
        )
    if len(stacks) == 1 and not model.config.is_encoder_decoder:
        (stack,) = found
        return {"layers": Stack("layers", *list(vars(stack).values())[1:])}
    return stacks


def _stack(model: PreTrainedModel, path: str, layers: nn.ModuleList) -> Stack | None:
    owner, inner = max(_models_around(model, path), key=lambda around: len(around[0]))
    config = inner.config
    if not any(config is part for part in configs_in(model.config)):
        config = model.config  # T5 gives its stacks altered copies, which are not saved
    name = owner
    if model.config.is_encoder_decoder:
        name = next((part for part in path.split(".") if part in _FIELDS_OF), owner)
    for field in _FIELDS_OF.get(name, _FIELDS):
        if len(layers) > 0 and getattr(config, field, None) == len(layers):
            return Stack(name, path, owner, layers, config, field)
    return None


def _only_convolves(layers: nn.ModuleList) -> bool:
    # Not by the lack of a Linear alone: those that some quantizers put in its place are none.
    modules = list(layers.modules())
    convolves = any(isinstance(module, nn.Conv1d) for module in modules)
    return convolves and not any(isinstance(module, (nn.Linear, Conv1D)) for module in modules)


def _models_around(model: PreTrainedModel, path: str) -> list[tuple[str, PreTrainedModel]]:
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, PreTrainedModel) and (not name or path.startswith(f"{name}."))
    ]


def configs_in(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """`config` and those inside it."""
    inner = [getattr(config, name) for name in config.sub_configs]
    return [config, *(part for sub in inner if sub is not None for part in configs_in(sub))]
