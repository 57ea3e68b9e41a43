"""Moves the parts of a distillation's loss against each other while it trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from hf_compress.callbacks.base import CompressionCallback
from hf_compress.callbacks.masking import MaskingCallback
from hf_compress.distillation.trainer import DistillationMixin
from hf_compress.schedules import Schedule, name_of

Course = Schedule | tuple[float, float]
"""A schedule of optimizer steps, or the first and the last value of a straight line."""


class AnnealingCallback(CompressionCallback):
    """Changes what a distilling Trainer mixes, from optimizer step to optimizer step.

        AnnealingCallback(alpha=(0.9, 0.1), temperature=(8.0, 1.0), weights={"hidden": (1.0, 0.0)})

    alpha, temperature: as in `DistillationArguments`, which stay as they are: evaluations go on with
        those, so that they can be compared with each other. None: not annealed.
    weights: of matches, by the name that they are logged under without "loss_"; at 0 one is left out.
    follow: a pruning callback of the same Trainer, of which what is done takes the place of the time:
        half way between the two values is where half of the zeros asked are there.

    Each is a `hf_compress.schedules.Schedule`, or a pair (first, last) for a straight line through the
    whole training, and a pure function of the optimizer steps done, or of the zeros: resuming equals
    never having stopped. Logs `alpha`, `temperature` and `weight_<match>` of the last step.

    Raises ValueError when made with nothing to anneal, values out of range, or times beside `follow`;
    when training begins for a Trainer that does not distil, a match that it has not, a schedule that
    cannot finish, and a `follow` that is not among its callbacks.
    """

    finished = True  # no model is further compressed than another for it

    def __init__(
        self,
        *,
        alpha: Course | None = None,
        temperature: Course | None = None,
        weights: Mapping[str, Course] | None = None,
        follow: MaskingCallback | None = None,
    ) -> None:
        self.alpha = None if alpha is None else _schedule("alpha", alpha, _is_fraction)
        self.temperature = (
            None if temperature is None else _schedule("temperature", temperature, _is_positive)
        )
        self.weights = {
            name: _schedule(f"weights[{name!r}]", course, _is_weight)
            for name, course in (weights or {}).items()
        }
        if not self._schedules:
            raise ValueError(
                "there is nothing to anneal: pass `alpha`, `temperature` or `weights`, such as "
                "alpha=(0.9, 0.1)."
            )
        if follow is not None:
            _check_followed(follow, self._schedules)
        self.follow = follow
        self._trainer: DistillationMixin | None = None
        self._values: dict[str, float] = {}

    def measurements(self) -> dict[str, float]:
        return self._values

    def describe(self) -> dict[str, object]:
        courses = {
            name: {
                "from": course.initial,
                "to": course.final,
                "schedule": name_of(course.shape),
                **({} if self.follow else {"start": course.start, "end": course.end}),
            }
            for name, course in self._schedules.items()
        }
        return {"method": "annealing", "over": "sparsity" if self.follow else "steps", **courses}

    def attach(self, trainer: Trainer) -> None:
        """As the base does. Raises ValueError for a `trainer` that does not distil."""
        if not isinstance(trainer, DistillationMixin):
            raise ValueError(
                f"{type(trainer).__name__} does not distil, so there is nothing to anneal: use a "
                "DistillationTrainer, or DistillationMixin on top of this one."
            )
        super().attach(trainer)
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        trainer = self._distilling()
        known = trainer.matching.weights
        if unknown := sorted(self.weights.keys() - known.keys()):
            raise ValueError(
                f"`weights` names {', '.join(map(repr, unknown))}, but the matches of the trainer are "
                f"{', '.join(map(repr, known)) or 'none at all'}."
            )
        if self.follow is not None and self.follow not in trainer.callback_handler.callbacks:
            raise ValueError(
                f"the {type(self.follow).__name__} to `follow` is not among the callbacks of the "
                "trainer: pass both."
            )
        for schedule in self._schedules.values():
            schedule.span(state.max_steps)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._values = {
            name: schedule.value(state.global_step, state.max_steps)
            if self.follow is None
            else schedule.along(self.follow.progress)
            for name, schedule in self._schedules.items()
        }
        trainer = self._distilling()
        trainer.annealed = self._values
        for name in self.weights:
            trainer.matching.weights[name] = self._values[f"weight_{name}"]

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        if logs is not None and "loss" in logs:  # evaluations are not annealed
            super().on_log(args, state, control, logs=logs, **kwargs)

    @property
    def _schedules(self) -> dict[str, Schedule]:
        """By the name of the log."""
        named = {"alpha": self.alpha, "temperature": self.temperature}
        given = {name: schedule for name, schedule in named.items() if schedule is not None}
        return given | {f"weight_{name}": schedule for name, schedule in self.weights.items()}

    def _distilling(self) -> DistillationMixin:
        if self._trainer is None:
            raise ValueError(
                "the AnnealingCallback does not know its trainer: pass it to a DistillationTrainer as "
                "callbacks=[...], or after add_callback call callback.attach(trainer)."
            )
        return self._trainer


def _schedule(name: str, given: Any, allowed: Callable[[float], str | None]) -> Schedule:
    if isinstance(given, Schedule):
        schedule = given
    elif isinstance(given, tuple | list) and len(given) == 2:
        schedule = Schedule(initial=given[0], final=given[1], shape="linear")
    else:
        raise ValueError(
            f"`{name}` is {given!r}: pass the first and the last value, such as (0.9, 0.1), or a "
            "hf_compress.schedules.Schedule."
        )
    for value in (schedule.initial, schedule.final):
        if (expected := allowed(value)) is not None:
            raise ValueError(f"`{name}` goes from {schedule.initial} to {schedule.final}: {expected}.")
    return schedule


def _is_fraction(value: float) -> str | None:
    return None if 0 <= value <= 1 else "it is a part of the loss, in [0, 1]"


def _is_positive(value: float) -> str | None:
    return None if 0 < value < float("inf") else "it must stay above 0"


def _is_weight(value: float) -> str | None:
    return None if 0 <= value < float("inf") else "a weight is 0 or more"


def _check_followed(follow: Any, schedules: Mapping[str, Schedule]) -> None:
    if not isinstance(follow, MaskingCallback):
        raise ValueError(
            f"`follow` is a {type(follow).__name__}: pass the PruningCallback that is in `callbacks` "
            "too."
        )
    timed = [name for name, each in schedules.items() if (each.start, each.end) != (0.0, 1.0)]
    if timed:
        raise ValueError(
            f"{timed[0]} has a `start` or an `end`, but with `follow` the sparsity takes the place of "
            "the time: leave them out, or set those of the pruning."
        )
