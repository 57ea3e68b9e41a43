"""The life cycle of constraints in a training, which all callbacks that constrain weights share."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_compress.callbacks.base import CompressionCallback
from hf_compress.constraint import Constraints, TimedConstraint, constrain, is_constrained


class ConstrainingCallback(CompressionCallback):
    """A callback that attaches constraints when training begins, and tells them the time before each
    step. Call `_detach` when it ends."""

    _constraints: Constraints | None = None
    _timed: tuple[TimedConstraint, ...] = ()

    @property
    def attached(self) -> bool:
        """Whether a training that has begun is constrained."""
        return self._constraints is not None

    @abc.abstractmethod
    def _attach(self, state: TrainerState, model: Any, optimizer: Any) -> None:
        """Make the constraints and pass each to `_constrain`."""

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: object,
    ) -> None:
        # Trainer begins again after `auto_find_batch_size` and at a second `train()`.
        self._detach()
        if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
            raise ValueError(
                "the model is wrapped in FSDP1, which flattens the parameters: use FSDP2 "
                "(`fsdp_version: 2`), or DDP."
            )
        try:
            self._attach(state, model, optimizer)
        except Exception:
            # A refused training leaves nothing behind on the model or the optimizer.
            self._detach()
            raise

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        for constraint in self._timed:
            constraint.at(self._time(state, state.global_step + 1), state.max_steps)

    def _time(self, state: TrainerState, step: int) -> int:
        """The time that the constraints are told at optimizer step `step`."""
        return step

    def _constrain(
        self,
        state: TrainerState,
        optimizer: Any,
        parameters: Mapping[str, nn.Parameter],
        constraint: TimedConstraint,
        *,
        method: str,
    ) -> None:
        """Raises ValueError where a resumed run cannot go on as the saved one would have; `method` is
        its name in the message."""
        constraint.at(self._time(state, state.global_step), state.max_steps)
        if constraint.begun:
            _check_resumed(state, optimizer, parameters, method)
        self._constraints = constrain(optimizer, parameters, constraint)
        self._timed += (constraint,)

    def _detach(self) -> None:
        self._timed = ()
        if self._constraints is not None:
            self._constraints.remove()
            self._constraints = None


def _check_resumed(
    state: TrainerState, optimizer: Any, parameters: Mapping[str, nn.Parameter], method: str
) -> None:
    """Raises ValueError where training goes on from a checkpoint that has no state of `method`."""
    if state.global_step > 0 and not is_constrained(optimizer, parameters):
        raise ValueError(
            f"the checkpoint of step {state.global_step} knows nothing of {method}: its optimizer.pt "
            "is missing, or it was saved without the callback. Resume from another one, or let the "
            f"schedule begin there: start={state.global_step}."
        )
