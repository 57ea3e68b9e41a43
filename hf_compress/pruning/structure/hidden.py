"""Hidden features: those of the residual stream, which every layer reads and adds to.

All layers must agree on them, so each is one unit in the whole model. An RMSNorm divides its n
features by the root of their mean square plus epsilon. Of the k that stay, where the others are zero,
the mean square is n / k times as large: with n / k times the epsilon too, and a weight of
sqrt(n / k) times, the smaller norm gives exactly what the larger one did. (A LayerNorm subtracts a
mean, which k features without the zeros do not have: no weight mends that.)

The epsilon counts: in SmolLM2-135M, whose embeddings are small, leaving it changed logits by 3e-3. It
is one for all, and so changes in norms within heads too (of Qwen3), by some 1e-7 of what they give:
the inputs of those are of the order of 1. In half precision the weights of norms are rounded anew.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_compress.pruning.structure.anatomy import Slice, Units, name_of
from hf_compress.pruning.structure.architectures import Hidden, Stack


def hidden_units(model: PreTrainedModel, hidden: Hidden, stacks: Mapping[str, Stack]) -> Units:
    """All of `model`, whose stacks of layers are at the paths that `stacks` names."""
    slices = tuple(Slice(*owned, width=1) for owned in _dimensions(model, hidden))
    norms = [
        piece.name.removesuffix(".weight")
        for piece in slices
        if piece.param.dim() == 1 and piece.name.endswith(".weight")
    ]
    masks = {path.rpartition(".")[0]: stack.mask for path, stack in stacks.items()}
    unscaled = hidden.divided if _divides_by_size(model) else None
    return Units(
        name=name_of(model, model.get_input_embeddings()),
        kind="hidden",
        count=getattr(model.config, hidden.size),
        fields=(hidden.size,),
        slices=slices,
        readers=tuple(norms),
        masks=tuple(
            next(mask for backbone, mask in masks.items() if norm.startswith(backbone))
            for norm in norms
        ),
        # Where the head divides by the root of a number that shrinks, that is made up already.
        rescaled=tuple(f"{norm}.weight" for norm in norms if norm != unscaled),
    )


def set_hidden_size_(config: PreTrainedConfig, hidden: Hidden, size: int) -> None:
    """In place: another number of hidden features, heads of the size they had, the epsilon of norms."""
    old = getattr(config, hidden.size)
    if hidden.heads is not None and config.to_dict().get("head_dim") is None:
        config.head_dim = old // getattr(config, hidden.heads)
    setattr(config, hidden.size, size)
    setattr(config, hidden.epsilon, getattr(config, hidden.epsilon) * old / size)


def _dimensions(model: PreTrainedModel, hidden: Hidden) -> list[tuple[str, nn.Parameter, int]]:
    """Name, parameter and dimension wherever hidden features are in weights; tied ones come once.

    The class itself tells: those dimensions grow in a model of a config with more of them.
    """
    config = copy.deepcopy(model.config)
    set_hidden_size_(config, hidden, 2 * getattr(config, hidden.size))
    with torch.device("meta"):
        wider = type(model)(config)
    return [
        (name, param, dim)
        for name, param in model.named_parameters()
        for dim, size in enumerate(wider.get_parameter(name).shape)
        if size != param.shape[dim]
    ]


def _divides_by_size(model: PreTrainedModel) -> bool:
    """Whether the head divides its input by the root of the hidden size (as that of T5 before 1.1)."""
    scaled = model.config.to_dict().get("scale_decoder_outputs", False)
    return scaled and model.get_output_embeddings() is not None
