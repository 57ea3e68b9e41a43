"""Weights that accelerate keeps in main memory or on disk until a forward needs them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate.utils import OffloadedWeightsLoader, align_module_device, has_offloaded_params
from torch import Tensor, nn


@contextmanager
def in_memory(model: nn.Module, name: str) -> Iterator[Tensor]:
    """The weight of this name, to be changed in place; loaded where it is offloaded.

    Offloaded weights, once changed, stay in main memory: files on disk are left as they are.
    """
    owner_name, _, own_name = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    with align_module_device(owner):
        param = owner.get_parameter(own_name)
        yield param
        if has_offloaded_params(owner):
            hook: Any = owner._hf_hook
            weights = hook.weights_map
            store = weights.dataset
            if isinstance(store, OffloadedWeightsLoader):
                store = store.state_dict  # read before the index of what is on disk
            store[weights.prefix + own_name] = param.detach().cpu()
