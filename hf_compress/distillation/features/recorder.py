"""What happens inside a model during one forward, taken down by forward hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from hf_compress.distillation.features.attention import Attended, Watch
from hf_compress.distillation.stacks import Stack, find_stacks

Value = Tensor | Attended


class Feature(NamedTuple):
    """One thing to take down: `kind` is "hidden", "embeddings" or "attention" of a layer of the stack
    called `place`, or "module", what the module of that name gives."""

    kind: str
    place: str
    layer: int = 0


class Recorder:
    """Takes down `features` of a model, in the forward between `start` and `take`.

    The module tree and the state of the model stay as they are. A forward that activation
    checkpointing repeats in the backward pass comes after `take`, and so is not taken down again.
    Raises ValueError where attention is wanted and cannot be seen.
    """

    def __init__(self, model: PreTrainedModel, features: Iterable[Feature]) -> None:
        self._on = False
        self._values: dict[Feature, Value] = {}
        self._handles: list[RemovableHandle] = []
        self._sources: dict[Feature, nn.Module] = {}
        self._features = set(features)
        self._name = type(model).__name__
        wants_attention = any(feature.kind == "attention" for feature in self._features)
        self._watch = Watch(model) if wants_attention else None
        stacks = find_stacks(model)
        for feature in self._features:
            self._attach(model, stacks, feature)

    def start(self) -> None:
        self._on = True
        self._values = {}

    def take(self, *, learns: bool) -> dict[Feature, Value]:
        """What was taken down. Raises ValueError where something was not seen, or where the model
        `learns`, but no gradient could flow into it."""
        self._on = False
        values, self._values = self._values, {}
        if missing := sorted(self._features - values.keys()):
            raise ValueError(
                f"{self._name} was run without its {missing[0].kind} of {missing[0].place}, layer "
                f"{missing[0].layer}. Layers must not be dropped at random (set `layerdrop` to 0), and "
                "attention can be compared only in models that attend through transformers' "
                "AttentionInterface."
            )
        for feature, value in values.items():
            tensor = value if isinstance(value, Tensor) else value.query
            source = self._sources.get(feature)
            trained = source is not None and any(p.requires_grad for p in source.parameters())
            if learns and trained and not tensor.requires_grad:
                raise ValueError(
                    f"no gradient flows into the {feature.kind} of {feature.place}: reentrant "
                    "activation checkpointing cuts it off. Give it use_reentrant=False."
                )
        return values

    def remove(self) -> None:
        """Detach from the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._watch is not None:
            self._watch.end()

    def _attach(self, model: PreTrainedModel, stacks: dict[str, Stack], feature: Feature) -> None:
        if feature.kind == "module":
            source = observed = model.get_submodule(feature.place)
        else:
            stack = stacks[feature.place]
            source = observed = stack.layers[feature.layer]
            if feature.kind == "hidden" and feature.layer == len(stack.layers) - 1:
                observed = model.get_submodule(stack.owner)
        if feature.kind != "embeddings":
            self._sources[feature] = source
        if feature.kind == "embeddings":
            self._handles.append(
                observed.register_forward_pre_hook(self._before(feature), with_kwargs=True)
            )
        elif self._watch is not None and feature.kind == "attention":
            self._watch.add(observed, self._note(feature))
        else:
            self._handles.append(observed.register_forward_hook(self._after(feature)))

    def _note(self, feature: Feature) -> Callable[[Value], None]:
        def note(value: Value) -> None:
            # A decoder's layer attends to itself first, then to the encoder.
            if self._on:
                self._values.setdefault(feature, value)

        return note

    def _before(self, feature: Feature) -> Callable[..., None]:
        note = self._note(feature)

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            note(args[0] if args else kwargs["hidden_states"])

        return hook

    def _after(self, feature: Feature) -> Callable[..., None]:
        note = self._note(feature)

        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            note(output if isinstance(output, Tensor) else output[0])

        return hook
