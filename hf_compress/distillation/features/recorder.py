"""What happens inside a model during one forward, taken down by forward hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from hf_compress.distillation.stacks import Stack, find_stacks


class Feature(NamedTuple):
    """One thing to take down: `kind` is "hidden" or "embeddings" of a stack, or "module"."""

    kind: str
    place: str
    layer: int = 0


class Recorder:
    """Takes down `features` of a model, in the forwards between `start` and `take`.

    The module tree and the state of the model stay as they are. A forward that activation
    checkpointing repeats in the backward pass comes after `take`, and so is not taken down again.
    """

    def __init__(self, model: PreTrainedModel, features: Iterable[Feature]) -> None:
        self._on = False
        self._values: dict[Feature, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        self._trained: dict[Feature, nn.Module] = {}
        stacks = find_stacks(model)
        for feature in features:
            self._attach(model, stacks, feature)

    def start(self) -> None:
        self._on = True
        self._values = {}

    def take(self) -> dict[Feature, Tensor]:
        """What was taken down. Raises ValueError where no gradient could flow into it, but should."""
        self._on = False
        values, self._values = self._values, {}
        for feature, value in values.items():
            trained = feature in self._trained and any(
                parameter.requires_grad for parameter in self._trained[feature].parameters()
            )
            if trained and torch.is_grad_enabled() and not value.requires_grad:
                raise ValueError(
                    f"no gradient flows into what {feature.place} gives: reentrant activation "
                    "checkpointing cuts it off. Pass gradient_checkpointing_kwargs={'use_reentrant': "
                    "False}."
                )
        return values

    def remove(self) -> None:
        """Detach from the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _attach(self, model: PreTrainedModel, stacks: dict[str, Stack], feature: Feature) -> None:
        if feature.kind == "module":
            module = model.get_submodule(feature.place)
            self._after(module, feature, module)
            return
        stack = stacks[feature.place]
        layer = stack.layers[feature.layer]
        if feature.kind == "embeddings":
            self._handles.append(
                layer.register_forward_pre_hook(self._before(feature), with_kwargs=True)
            )
        elif feature.layer == len(stack.layers) - 1:
            self._after(model.get_submodule(stack.owner), feature, layer)
        else:
            self._after(layer, feature, layer)

    def _before(self, feature: Feature) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._on:
                self._values[feature] = args[0] if args else kwargs["hidden_states"]

        return hook

    def _after(self, module: nn.Module, feature: Feature, trained: nn.Module) -> None:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if self._on:
                self._values[feature] = output if isinstance(output, Tensor) else output[0]

        self._trained[feature] = trained
        self._handles.append(module.register_forward_hook(hook))
