"""Who is asked: frozen models, or the student's own base without its adapters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from accelerate.utils import send_to_device
from torch import nn

from hf_compress.distillation.alignment import Classes
from hf_compress.distillation.cache.cells import Origin
from hf_compress.distillation.cache.states import KeptStates
from hf_compress.distillation.tasks.heads import Head
from hf_compress.distillation.tasks.task import Task
from hf_compress.distillation.teacher import accepted_inputs, check_pair, load_teacher
from hf_compress.frozen import evaluating
from hf_compress.targets import without_adapters


class Teacher(Protocol):
    """Inputs of the student -> the teacher's outputs, in the student's classes, without a graph."""

    def __call__(self, features: Mapping[str, Any]) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class Teaching:
    """The teachers of a training, of whichever kind, and what it must become for them.

    asked: how they are asked; models: what of them is in memory. collator, task: in place of the given
    one and of that of the head; None where those stay. alone: the one model that answers as it stands,
    not one of several, nor one under adapters. inside: the model whose inner parts can be matched,
    which where there are `states`, kept of it, needs no weights. origin: of answers that were kept.
    """

    asked: Sequence[Teacher]
    models: Sequence[nn.Module] = ()
    collator: Any = None
    task: Task | None = None
    alone: nn.Module | None = None
    inside: nn.Module | None = None
    states: KeptStates | None = None
    origin: Origin | None = None


class FrozenTeacher:
    """A model of its own.

    classes: those of its classes, on the last dimension of its logits, that the student has; None: all.
    """

    def __init__(self, model: nn.Module, classes: Classes | None = None) -> None:
        self.model = model
        self.classes = classes

    @torch.no_grad()
    def __call__(self, features: Mapping[str, Any]) -> Any:
        return answer(self.model, features, self.classes)


class BaseTeacher:
    """The base of a PEFT model with its adapters switched off, in evaluation mode: no second copy.

    Raises ValueError where `student` has no adapters.
    """

    def __init__(self, student: nn.Module, classes: Classes | None = None) -> None:
        if without_adapters(student) is student:
            raise ValueError(
                f"teacher='base' is the model under the adapters of the student, but "
                f"{type(student).__name__} has none. Pass teacher='self' for a copy of it as it is now."
            )
        self.model: Any = student
        self.classes = classes

    @torch.no_grad()
    def __call__(self, features: Mapping[str, Any]) -> Any:
        trained = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        try:
            with evaluating(self.model), self.model.disable_adapter():
                # By way of the whole: inside of it the shards of FSDP2 are not gathered.
                return answer(self.model, features, self.classes)
        finally:
            # peft freezes what it switches off, and afterwards thaws all of it.
            for parameter, trains in trained:
                parameter.requires_grad_(trains)


def answer(model: nn.Module, features: Mapping[str, Any], classes: Classes | None = None) -> Any:
    """The output of `model` for those `features` that it takes, of these `classes`, on its device."""
    given = accepted_inputs(model, {**features, "use_cache": False})
    # Of a model on a device of its own; one on several moves them itself.
    if hasattr(model, "hf_device_map") and not hasattr(model, "_hf_hook"):
        given = send_to_device(given, next(model.parameters()).device)
    output = model(**given)
    if classes is not None:
        output.logits = output.logits[..., classes]
    return output


def normalized(weights: Sequence[float] | None, teachers: int) -> tuple[float, ...]:
    """Weights that add up to 1; None: all equal. Raises ValueError where they do not fit."""
    if weights is None:
        return (1 / teachers,) * teachers
    if len(weights) != teachers or not all(w > 0 and math.isfinite(w) for w in weights):
        raise ValueError(
            f"`teacher_weights` is {list(weights)!r}: pass one number above 0 for each of the "
            f"{teachers} teachers."
        )
    return tuple(weight / sum(weights) for weight in weights)


def ask(
    given: Sequence[nn.Module | str],
    student: nn.Module,
    head: Head,
    *,
    bits: int | None,
    device: torch.device,
    processing: Any,
) -> Teaching:
    """By models in memory, which read what the student reads.

    given: each a module, a path or id, or "base"; bits, device: as in `load_teacher`; processing: as in
    `check_pair`. Raises what these two raise, and ValueError for none at all.
    """
    if not given:
        raise ValueError("`teacher` is empty: pass at least one.")
    if any(isinstance(each, str) and each == "cached" for each in given):
        raise ValueError(
            "teacher='cached' must stand alone: kept answers are not averaged with others'."
        )
    models: list[nn.Module] = []
    all_classes: list[Classes | None] = []
    for each in given:
        if isinstance(each, str) and each == "base":
            if bits is not None:
                raise ValueError(
                    f"teacher='base' is as precise as the student's own base: leave out "
                    f"`teacher_bits` ({bits})."
                )
            models.append(without_adapters(student))
            all_classes.append(None)
        else:
            models.append(load_teacher(each, head, bits=bits, device=device))
            all_classes.append(check_pair(student, models[-1], processing))
    cuts = [classes.stop for classes in all_classes if isinstance(classes, slice)]
    if cuts:
        # Distributions are averaged over the tokens that all of them have.
        all_classes = [slice(0, min(cuts))] * len(models)
    asked = [
        BaseTeacher(student, classes) if each == "base" else FrozenTeacher(model, classes)
        for each, model, classes in zip(given, models, all_classes, strict=True)
    ]
    alone = models[0] if len(models) == 1 and given[0] != "base" else None
    return Teaching(asked=asked, models=models, alone=alone, inside=alone)
