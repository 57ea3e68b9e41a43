"""Prunes the model while any Trainer trains it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from hf_compress.callbacks.masking import MaskingCallback
from hf_compress.pruning.input_squares import InputSquares
from hf_compress.pruning.masks import ZeroKeeper
from hf_compress.pruning.pruner import Pruner
from hf_compress.pruning.ranking import Scope
from hf_compress.pruning.scores import Score, find_score
from hf_compress.schedules import Clock, Drop, Shape, clock_of, name_of
from hf_compress.targets import Target

logger = logging.get_logger(__name__)


class PruningCallback(MaskingCallback):
    """Pruning inside an unmodified `Trainer`, along a schedule of optimizer steps.

    sparsity, targets, ignore: see `MaskingCallback`; an N:M pattern needs no sparsity.
    score, pattern, scope, schedule, start, end, interval, min_keep: see
        `hf_compress.pruning.pruner.Pruner`. From `end` on the mask is fixed and the rest recovers.
    hold_when: a `hf_compress.schedules.Drop` of a metric, after which the schedule stands still until
        an evaluation without one: `Drop(metric="accuracy", by=0.01)`.
    step_back_when: a drop, after which the sparsity also returns to that of the last evaluation without
        one; pruned weights come back as they were. Not after the schedule has ended.

    A schedule that was held may not reach its end, and then the sparsity: a warning says so.

    Raises ValueError as `MaskingCallback` does, and when training begins for weights that the pattern
    does not divide, a schedule that cannot finish, a drop to watch for without evaluations, and a
    checkpoint without its state.
    """

    def __init__(
        self,
        sparsity: float | Mapping[str, float] | None = None,
        *,
        score: str | Score = "obd",
        pattern: str = "unstructured",
        scope: Scope = "global",
        schedule: str | Shape = "cubic",
        start: int | float = 0.0,
        end: int | float = 0.6,
        interval: int | None = None,
        min_keep: float = 0.01,
        hold_when: Drop | None = None,
        step_back_when: Drop | None = None,
        targets: str | Sequence[str] | None = None,
        ignore: str | Sequence[str] | None = None,
    ) -> None:
        for name, drop in (("hold_when", hold_when), ("step_back_when", step_back_when)):
            if drop is not None and not isinstance(drop, Drop):
                raise ValueError(
                    f"`{name}` is {drop!r}: pass a drop of a metric, such as "
                    "Drop(metric='accuracy', by=0.01), from hf_compress.schedules."
                )
        self.score = find_score(score)
        self.pattern = pattern
        self.scope = scope
        self.schedule = schedule
        self.start = start
        self.end = end
        self.interval = interval
        self.min_keep = min_keep
        self.hold_when = hold_when
        self.step_back_when = step_back_when
        self._inputs: list[InputSquares] = []
        self._clock = Clock()
        self._evaluated = True
        super().__init__(sparsity, targets=targets, ignore=ignore)

    @staticmethod
    def keep(
        *,
        targets: str | Sequence[str] | None = None,
        ignore: str | Sequence[str] | None = None,
    ) -> KeepingCallback:
        """Only freezes what is zero, so that a sparse model can be trained further: no latent copy."""
        return KeepingCallback(targets=targets, ignore=ignore)

    def describe(self) -> dict[str, object]:
        described = super().describe()
        if self.sparsity is None:
            described["sparsity"] = self._constraint(None).schedule.final
        return described | {
            "method": "pruning",
            "paper": self.score.paper,
            "score": self.score.name,
            "pattern": self.pattern,
            "scope": self.scope,
            "schedule": name_of(self.schedule),
            "start": self.start,
            "end": self.end,
            "interval": self.interval,
            "min_keep": self.min_keep,
            "hold_when": None if self.hold_when is None else vars(self.hold_when),
            "step_back_when": None if self.step_back_when is None else vars(self.step_back_when),
        }

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: object,
    ) -> None:
        watched = self.hold_when or self.step_back_when
        if watched is not None and args.eval_strategy == "no":
            raise ValueError(
                f"a drop of {watched.name} cannot be seen without evaluations: set `eval_strategy` to "
                "'steps' or 'epoch'."
            )
        self._evaluated = True
        super().on_train_begin(args, state, control, model=model, optimizer=optimizer, **kwargs)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        self._evaluated = True

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        super().on_pre_optimizer_step(args, state, control, **kwargs)
        if self.finished:
            self._remove_hooks()

    def _time(self, state: TrainerState, step: int) -> int:
        if self._evaluated:
            self._evaluated = False
            for drop in (self.hold_when, self.step_back_when):
                if drop is not None:
                    _check_logged(drop, state)
            self._clock = clock_of(state.log_history, hold=self.hold_when, back=self.step_back_when)
        return self._clock.at(step)

    def _why_unfinished(self, state: TrainerState) -> str:
        lost = state.global_step - self._clock.at(state.global_step)
        if lost == 0:
            return super()._why_unfinished(state)
        drops = " and ".join(drop.name for drop in (self.hold_when, self.step_back_when) if drop)
        return (
            f"drops of {drops} took {lost} of {state.global_step} steps from its schedule. Train for "
            "longer, accept a larger drop, or ask for less"
        )

    def _attach(self, state: TrainerState, model: Any, optimizer: Any) -> None:
        super()._attach(state, model, optimizer)
        for pruner in cast(list[Pruner], self._masks):
            if state.global_step == 0 and pruner.sparsity > pruner.schedule.final:
                logger.warning(
                    f"the weights are {pruner.sparsity:.4f} sparse already, more than the "
                    f"{pruner.schedule.final:.4f} asked, and zeros stay: begin with the dense model "
                    "to prune less."
                )

    def _constraint(
        self,
        sparsity: float | None,
        *,
        targets: Mapping[str, Target] | None = None,
        model: nn.Module | None = None,
    ) -> Pruner:
        inputs = None
        if self.score.sees == "inputs" and model is not None and targets is not None:
            inputs = InputSquares(model, targets)
            self._inputs.append(inputs)
        return Pruner(
            sparsity,
            score=self.score,
            pattern=self.pattern,
            scope=self.scope,
            schedule=self.schedule,
            start=self.start,
            end=self.end,
            interval=self.interval,
            min_keep=self.min_keep,
            targets=targets,
            inputs=inputs,
        )

    def _detach(self) -> None:
        super()._detach()
        self._remove_hooks()

    def _remove_hooks(self) -> None:
        for inputs in self._inputs:
            inputs.remove()
        self._inputs.clear()


class KeepingCallback(MaskingCallback):
    """What is zero in the targeted weights stays zero; see `PruningCallback.keep`.

    Raises ValueError when training begins and nothing is zero; else as `MaskingCallback`.
    """

    def __init__(
        self, *, targets: str | Sequence[str] | None, ignore: str | Sequence[str] | None
    ) -> None:
        super().__init__(None, targets=targets, ignore=ignore)

    def describe(self) -> dict[str, object]:
        return super().describe() | {"method": "keeping zeros"}

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: object,
    ) -> None:
        super().on_train_begin(args, state, control, model=model, optimizer=optimizer, **kwargs)
        if self.measurements()["sparsity"] == 0:
            self._detach()
            raise ValueError("there is no zero to keep: prune first, or pass a `sparsity` instead.")

    def _constraint(
        self,
        sparsity: float | None,
        *,
        targets: Mapping[str, Target] | None = None,
        model: nn.Module | None = None,
    ) -> ZeroKeeper:
        return ZeroKeeper()


def _check_logged(drop: Drop, state: TrainerState) -> None:
    evaluations = [row for row in state.log_history if any(key.startswith("eval_") for key in row)]
    if evaluations and not any(drop.name in row for row in evaluations):
        raise ValueError(
            f"the evaluations have no {drop.name!r}; they have "
            f"{sorted(key for key in evaluations[-1] if key.startswith('eval_'))}."
        )
