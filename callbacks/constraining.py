"""The life cycle of constraints in a training, which all callbacks that constrain weights share."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_compress.callbacks.base import CompressionCallback
from hf_compress.constraint import Constraint, Constraints, constrain, is_constrained


class ConstrainingCallback(CompressionCallback):
    """A callback that attaches constraints when training begins. Call `_detach` when it ends."""

    _constraints: Constraints | None = None

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

    def _constrain(
        self, optimizer: Any, parameters: Mapping[str, nn.Parameter], constraint: Constraint
    ) -> None:
        self._constraints = constrain(optimizer, parameters, constraint)

    def _detach(self) -> None:
        if self._constraints is not None:
            self._constraints.remove()
            self._constraints = None


def check_resumed(
    state: TrainerState, optimizer: Any, parameters: Mapping[str, nn.Parameter], method: str
) -> None:
    """Raises ValueError where training goes on from a checkpoint that has no state of `method`."""
    if state.global_step > 0 and not is_constrained(optimizer, parameters):
        raise ValueError(
            f"the checkpoint of step {state.global_step} knows nothing of {method}: its optimizer.pt "
            "is missing, or it was saved without the callback. Resume from another one, or let the "
            f"schedule begin there: start={state.global_step}."
        )
