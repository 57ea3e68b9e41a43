"""A student made of some layers of its teacher (DistilBERT, papers/1910.01108)."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_compress.distillation.stacks import Stack, find_stacks
from hf_compress.targets import without_adapters

Layers = int | Sequence[int]
Chosen = Sequence[tuple[Stack, list[int]]]
STRATEGIES = ("uniform", "first", "last")
# Entries of a config that hold one value for each layer.
_BY_LAYER = ("layer_types", "mlp_layer_types", "layers_block_type", "no_rope_layers")


def init_student(
    teacher: PreTrainedModel,
    layers: Layers | Mapping[str, Layers],
    *,
    strategy: str = "uniform",
) -> PreTrainedModel:
    """A new model of the teacher's class with some of its layers; embeddings, head and all else are
    copied. Its config says so, so that plain `from_pretrained` loads what is saved.

    layers: how many, or the numbers of which (from 0, rising). It holds for both stacks of an
        encoder-decoder, unless it says {"encoder": ..., "decoder": ...}; a stack that is not named
        stays whole.
    strategy: "uniform" (evenly spaced, the first and the last included), "first" or "last".

    The teacher is unchanged and shares no weight with the student. Memory: both models.
    Raises ValueError for numbers out of range, for models without stacks of layers, adapted or packed
    ones, and where what a layer is made of follows from its number and would not fit.
    """
    _check_teacher(teacher)
    if strategy not in STRATEGIES:
        raise ValueError(f"`strategy` is {strategy!r}: pass one of {', '.join(STRATEGIES)}.")
    stacks = find_stacks(teacher)
    if not isinstance(layers, Mapping):
        layers = dict.fromkeys(stacks, layers)
    if unknown := sorted(layers.keys() - stacks.keys()):
        raise ValueError(
            f"`layers` names {unknown[0]!r}, but the stacks of {type(teacher).__name__} are "
            f"{', '.join(stacks)}."
        )
    kept = {name: _numbers(stacks[name], wanted, strategy) for name, wanted in layers.items()}
    chosen = [(stacks[name], numbers) for name, numbers in kept.items()]
    student = type(teacher)(_smaller_config(teacher.config, chosen))
    state = _smaller_state(teacher, student, chosen)
    # Assigned, so that each weight keeps its own dtype; that unties them.
    student.load_state_dict({name: value.clone() for name, value in state.items()}, assign=True)
    student.tie_weights()
    nn.Module.to(student, teacher.device)
    if teacher.can_generate():
        student.generation_config = copy.deepcopy(teacher.generation_config)
    return student.train(teacher.training)


def evenly_spaced(depth: int, layers: int) -> list[int]:
    """`layers` of `range(depth)`, first and last included; the last alone where there is one."""
    if layers == 1:
        return [depth - 1]
    return [round(i * (depth - 1) / (layers - 1)) for i in range(layers)]


def _check_teacher(teacher: nn.Module) -> None:
    if without_adapters(teacher) is not teacher:
        raise ValueError("the teacher carries PEFT adapters: merge them first (`merge_and_unload()`).")
    if not isinstance(teacher, PreTrainedModel):
        raise ValueError(
            f"{type(teacher).__name__} is not a transformers model: pass the model itself."
        )
    for name, param in teacher.named_parameters():
        if not param.is_floating_point() or param.is_meta:
            raise ValueError(
                f"{name} is {'offloaded' if param.is_meta else f'packed as {param.dtype}'}: load the "
                "teacher whole and without quantization."
            )


def _numbers(stack: Stack, wanted: Layers, strategy: str) -> list[int]:
    depth = len(stack.layers)
    if isinstance(wanted, int) and not isinstance(wanted, bool) and 1 <= wanted <= depth:
        if strategy == "uniform":
            return evenly_spaced(depth, wanted)
        return list(range(wanted) if strategy == "first" else range(depth - wanted, depth))
    if isinstance(wanted, (list, tuple, range)) and wanted:
        numbers = list(wanted)
        whole = all(isinstance(number, int) and not isinstance(number, bool) for number in numbers)
        if whole and numbers == sorted({*numbers}) and numbers[0] >= 0 and numbers[-1] < depth:
            return numbers
    raise ValueError(
        f"`layers` is {wanted!r}: {stack.path} of the teacher has {depth}, so pass 1 to {depth}, or a "
        f"list of rising numbers from 0 to {depth - 1}."
    )


def _smaller_config(config: PreTrainedConfig, kept: Chosen) -> PreTrainedConfig:
    if "depths" in config.to_dict():
        raise ValueError(
            "the layers of the teacher come in stages of different width: build the student."
        )
    copies: dict[int, Any] = {}
    smaller = copy.deepcopy(config, copies)
    for stack, numbers in kept:
        part = copies[id(stack.config)]
        setattr(part, stack.field, len(numbers))
        for name in _BY_LAYER:
            values = getattr(part, name, None)
            if isinstance(values, list) and len(values) == len(stack.layers):
                setattr(part, name, [values[number] for number in numbers])
    for stack, numbers in kept:
        if getattr(copies[id(stack.config)], stack.field) != len(numbers):
            raise ValueError(
                f"one `{stack.field}` counts the layers of several stacks: keep equally many of each."
            )
    return smaller


def _smaller_state(
    teacher: PreTrainedModel, student: PreTrainedModel, kept: Chosen
) -> dict[str, Tensor]:
    old, new = teacher.state_dict(), student.state_dict()
    source = {name: name for name in new}
    for stack, numbers in kept:
        where = _places(old, stack.path)
        for position, number in enumerate(numbers):
            there = f"{stack.path}.{position}."
            inside = {name.removeprefix(there) for name in new if name.startswith(there)}
            expected = {part for part, places in where.items() if number in places}
            for part in inside | expected:
                # What one layer alone has belongs to its position: T5's position bias.
                alone = len(where[part]) == 1
                taken = next(iter(where[part])) if alone else number
                if not alone and not (part in inside and part in expected):
                    raise ValueError(
                        f"what a layer of {type(teacher).__name__} is made of follows from its number: "
                        f"layer {number} cannot become layer {position} ({part}). Choose others."
                    )
                if part in inside:
                    source[f"{there}{part}"] = f"{stack.path}.{taken}.{part}"
    for name, value in new.items():
        if old[source[name]].shape != value.shape:
            raise ValueError(
                f"{name} has another shape in a {type(teacher).__name__} of fewer layers: build the "
                "student yourself."
            )
    return {name: old[source[name]] for name in new}


def _places(state: Mapping[str, Tensor], path: str) -> dict[str, set[int]]:
    """Parts of the layers of the list at `path`, by name: the numbers of the layers that have them."""
    places: dict[str, set[int]] = {}
    for name in state:
        if name.startswith(f"{path}."):
            number, _, part = name.removeprefix(f"{path}.").partition(".")
            places.setdefault(part, set()).add(int(number))
    return places
