"""What attention multiplies, seen where transformers lets attention functions be registered.

The model goes on to attend by the function that it had: its outputs, the memory of a fused kernel and
its dropout stay as they are. Maps are computed beside it, and only where they are compared; so they are
the maps before dropout, which never holds a zero that a divergence could trip over.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_compress.distillation.stacks import configs_in

_WATCHER = "_hf_compress_watcher"
_PREFIX = "hf_compress_watched_"
_WATCHABLE = ("sdpa", "eager")


class Attended(NamedTuple):
    """What one attention got: queries (rows, heads, positions, size), and keys and values of as many
    heads or fewer, each shared by neighbouring queries."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    bias: Tensor | None
    scaling: float | None
    softcap: float | None
    causal: bool


def scores(attended: Attended) -> tuple[Tensor, Tensor]:
    """The scores (rows, heads, queries, keys) before the softmax, and bool (rows or 1, heads or 1,
    queries, keys): the keys that each query sees, only whose scores mean something."""
    query, key = attended.query, attended.key
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scaling = query.shape[-1] ** -0.5 if attended.scaling is None else attended.scaling
    values = query @ key.transpose(-1, -2) * scaling
    if attended.softcap is not None:
        values = attended.softcap * (values / attended.softcap).tanh()
    if attended.bias is not None:
        values = values + attended.bias
    seen = torch.ones(values.shape[-2:], dtype=torch.bool, device=values.device)[None, None]
    mask = attended.mask
    if mask is None:
        return values, seen.tril() if attended.causal else seen
    mask = mask[..., : values.shape[-1]]
    if mask.dtype == torch.bool:
        return values, seen & mask
    # Additive: a bias, and the least number where nothing is to be seen.
    return values + mask, seen & (mask > torch.finfo(mask.dtype).min / 2)


class Watch:
    """While it lasts, `take_down(layer, attended)` is called by the attentions of watched layers."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Raises ValueError where the attention of `model` cannot be seen."""
        parts = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
        configs = {id(config): config for part in parts for config in configs_in(part)}
        self._configs = [(config, config._attn_implementation) for config in configs.values()]
        self._marked: list[nn.Module] = []
        for _, name in self._configs:
            if name is not None and name not in _WATCHABLE:
                raise ValueError(
                    f"{type(model).__name__} attends by attn_implementation={name!r}, which never has "
                    "maps, nor whole queries and keys in sight. To compare attention or its relations "
                    "load the model with attn_implementation='sdpa' or 'eager'."
                )
        for name in _WATCHABLE:
            AttentionInterface.register(_PREFIX + name, _watched(name))
            AttentionMaskInterface.register(_PREFIX + name, ALL_MASK_ATTENTION_FUNCTIONS[name])
        for config, name in self._configs:
            if name is not None:
                config._attn_implementation = _PREFIX + name

    def add(self, layer: nn.Module, take_down: Callable[[Attended], None]) -> None:
        """Call `take_down` with what each attention in `layer` gets, in their order."""
        for part in layer.modules():
            setattr(part, _WATCHER, take_down)
            self._marked.append(part)

    def end(self) -> None:
        """The model attends as before."""
        for config, name in self._configs:
            config._attn_implementation = name
        for part in self._marked:
            delattr(part, _WATCHER)
        self._configs.clear()
        self._marked.clear()


def _watched(name: str) -> Callable[..., Any]:
    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *others: Any,
        **settings: Any,
    ) -> Any:
        take_down = vars(module).get(_WATCHER)
        if take_down is not None:
            causal = settings.get("is_causal")
            attended = Attended(
                query=query,
                key=key,
                value=value,
                mask=attention_mask,
                bias=settings.get("position_bias"),
                scaling=settings.get("scaling"),
                softcap=settings.get("softcap"),
                causal=vars(module).get("is_causal", True) if causal is None else causal,
            )
            take_down(attended)
        return _original(name, module)(module, query, key, value, attention_mask, *others, **settings)

    return attend


def _original(name: str, module: nn.Module) -> Callable[..., Any]:
    if name != "eager":
        return ALL_ATTENTION_FUNCTIONS[name]
    # Each architecture has its own, beside its attention; wrappers may have subclassed that.
    for parent in type(module).__mro__:
        own = vars(sys.modules[parent.__module__]).get("eager_attention_forward")
        if own is not None:
            return own
    raise ValueError(
        f"{type(module).__name__} has no eager attention that can be seen: load the model with "
        "attn_implementation='sdpa'."
    )
