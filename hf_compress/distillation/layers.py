"""A student made of some layers of its teacher (DistilBERT, papers/1910.01108)."""

from __future__ import annotations

import copy
import re

from torch import nn
from transformers import PreTrainedModel


def student_from_teacher(teacher: PreTrainedModel, layers: int) -> PreTrainedModel:
    """A new model of the teacher's class with `layers` of its layers, evenly spaced, first and last
    included; embeddings, head and all else are copied.

    Its config says so, so that plain `from_pretrained` loads what is saved. The teacher is unchanged.

    Raises ValueError when `layers` is not in [1, the teacher's number of layers], or when the model
    has no single stack of layers of the length that its config says (encoder-decoders have two).
    """
    depth = teacher.config.num_hidden_layers
    if isinstance(layers, bool) or not isinstance(layers, int) or not 1 <= layers <= depth:
        raise ValueError(f"`layers` is {layers!r}: the teacher has {depth}, so pass 1 to {depth}.")
    stacks = [
        name
        for name, module in teacher.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth
    ]
    if len(stacks) != 1:
        raise ValueError(
            f"{type(teacher).__name__} has {len(stacks)} stacks of {depth} layers ({stacks}): build "
            "the student yourself and pass it to the trainer."
        )
    kept = evenly_spaced(depth, layers)
    config = copy.deepcopy(teacher.config)
    config.num_hidden_layers = layers
    if isinstance(types := getattr(config, "layer_types", None), list):
        config.layer_types = [types[i] for i in kept]
    student = type(teacher)(config)
    nn.Module.to(student, dtype=teacher.dtype)
    student.load_state_dict(_renumbered(teacher.state_dict(), stacks[0], kept))
    return student


def evenly_spaced(depth: int, layers: int) -> list[int]:
    """`layers` of `range(depth)`, first and last included; the last alone where there is one."""
    if layers == 1:
        return [depth - 1]
    return [round(i * (depth - 1) / (layers - 1)) for i in range(layers)]


def _renumbered(state: dict, stack: str, kept: list[int]) -> dict:
    pattern = re.compile(rf"({re.escape(stack)}\.)(\d+)(\..*)")
    place = {old: new for new, old in enumerate(kept)}
    result = {}
    for name, value in state.items():
        match = pattern.fullmatch(name)
        if match is None:
            result[name] = value
        elif int(match[2]) in place:
            result[f"{match[1]}{place[int(match[2])]}{match[3]}"] = value
    return result
