"""Prunes the model while any Trainer trains it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from hf_compress.callbacks.base import CompressionCallback
from hf_compress.constraint import Constraints, constrain, is_constrained
from hf_compress.pruning.plan import Plan
from hf_compress.pruning.pruner import Pruner, Scope, check_sparsity
from hf_compress.pruning.scores import SCORES
from hf_compress.pruning.select import count_kept
from hf_compress.schedules import Shape
from hf_compress.targets import Selection, find_targets

logger = logging.get_logger(__name__)


class PruningCallback(CompressionCallback):
    """Unstructured pruning inside an unmodified `Trainer`, along a schedule of optimizer steps.

    sparsity: fraction in [0, 1) of the targeted weights that are zero in the end; or a fraction for
        each entry of `targets`, as a dict: `{"re:attention": 0.5, "re:intermediate|output": 0.9}`.
        A weight that several entries match belongs to the first.
    score: "obd" (w^2 times the moving average of grad^2), "taylor" (moving average of |w * grad|)
        or "magnitude".
    scope: "global" ranks all weights of one sparsity together, "layer" each weight alone.
    schedule: "cubic", "linear", "cosine", "exponential", "step", "constant", or a function of
        progress in [0, 1].
    start, end: when the sparsity begins to rise and is reached: optimizer steps (int), or fractions
        of the training (float in [0, 1]). From `end` on the mask is fixed and the rest recovers.
    interval: optimizer steps between two rankings; by default 10, less in short schedules.
    min_keep: fraction of each weight that a global ranking leaves in any case.
    targets, ignore: class names, module names or "re:" patterns, see
        `hf_compress.targets.find_targets`. By default the Linear and Conv1D layers and experts of
        the backbone; never embeddings, heads, norms, biases, adapters.

    Logs `sparsity`, the fraction of the targeted weights that is zero. Every checkpoint is sparse as
    the log says, and no checkpoint counts as the best before the target is reached. Resuming from a
    checkpoint gives the same weights as never having stopped.

    Raises ValueError when made with a value out of range, and when training begins: for targets that
    match nothing, a schedule that cannot finish, a checkpoint without its state, FSDP1, DeepSpeed,
    layer-wise or schedule-free optimizers, models packed by bitsandbytes or whose weights are frozen
    under adapters.
    """

    def __init__(
        self,
        sparsity: float | Mapping[str, float],
        *,
        score: str = "obd",
        scope: Scope = "global",
        schedule: str | Shape = "cubic",
        start: int | float = 0.0,
        end: int | float = 0.6,
        interval: int | None = None,
        min_keep: float = 0.01,
        targets: str | Sequence[str] | None = None,
        ignore: str | Sequence[str] | None = None,
    ) -> None:
        if isinstance(sparsity, Mapping):
            if targets is not None:
                raise ValueError("`sparsity` as a dict names the targets: leave `targets` out.")
            if not sparsity:
                raise ValueError("`sparsity` is an empty dict: give a fraction for each target.")
            for fraction in sparsity.values():
                check_sparsity(fraction)
        self.sparsity = sparsity
        self.score = score
        self.scope = scope
        self.schedule = schedule
        self.start = start
        self.end = end
        self.interval = interval
        self.min_keep = min_keep
        self.targets = targets
        self.ignore = ignore
        # Wrong settings are told here rather than when the training begins.
        self._pruners = [self._pruner(fraction) for fraction in self._fractions().values()]
        self._constraints: Constraints | None = None
        self._selection = Selection()
        self._found: dict[str, float] = {}

    @property
    def finished(self) -> bool:
        return all(pruner.finished for pruner in self._pruners)

    def measurements(self) -> dict[str, float]:
        total = sum(pruner.total for pruner in self._pruners)
        return {"sparsity": sum(pruner.pruned for pruner in self._pruners) / max(total, 1)}

    def describe(self) -> dict[str, object]:
        name = self.schedule if isinstance(self.schedule, str) else self.schedule.__name__
        return {
            "method": "pruning",
            "paper": SCORES[self.score].paper,
            "sparsity": dict(self.sparsity) if isinstance(self.sparsity, Mapping) else self.sparsity,
            "score": self.score,
            "scope": self.scope,
            "schedule": name,
            "start": self.start,
            "end": self.end,
            "interval": self.interval,
            "min_keep": self.min_keep,
            "weights": self._found,
            "skipped": self._selection.skipped,
        }

    def dry_run(self, model: nn.Module) -> Plan:
        """What would be pruned, what not and why. Print it; nothing is changed.

        Raises ValueError for targets that match nothing.
        """
        groups = self._groups(model)
        fractions = {
            name: pruner.schedule.final
            for pruner, parameters in zip(self._pruners, groups, strict=True)
            for name in parameters
        }
        return Plan.of(model, self._selection, fractions)

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
            raise ValueError("FSDP1 flattens the parameters: use FSDP2 (`fsdp_version: 2`).")
        self._pruners = [self._pruner(fraction) for fraction in self._fractions().values()]
        for pruner, parameters in zip(self._pruners, self._groups(model), strict=True):
            pruner.at(state.global_step, state.max_steps)
            if state.global_step > 0 and not is_constrained(optimizer, parameters):
                self._refuse_to_begin_late(pruner, state)
            self._constraints = constrain(optimizer, parameters, pruner)

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        for pruner in self._pruners:
            pruner.at(state.global_step + 1, state.max_steps)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: object,
    ) -> None:
        self._detach()
        parameters = self._selection.parameters
        kept = {name: count_kept(param != 0) for name, param in parameters.items()}
        self._found = {name: 1 - kept[name] / param.numel() for name, param in parameters.items()}
        total = sum(param.numel() for param in parameters.values())
        zeros = total - sum(kept.values())
        due = sum(
            pruner.pruned if pruner.finished else round(pruner.schedule.final * pruner.total)
            for pruner in self._pruners
        )
        if zeros < due:
            logger.warning(
                f"the model is {zeros / total:.4f} sparse, not {due / total:.4f} as asked: training "
                f"ended at step {state.global_step} of {state.max_steps}, before the schedule did."
            )

    def _refuse_to_begin_late(self, pruner: Pruner, state: TrainerState) -> None:
        if pruner.schedule.value(state.global_step, state.max_steps) > 0.0:
            raise ValueError(
                f"the checkpoint of step {state.global_step} knows nothing of this pruning: its "
                "optimizer.pt is missing, or it was saved without the callback. Resume from another "
                f"one, or let the schedule begin there: start={state.global_step}."
            )

    def _detach(self) -> None:
        if self._constraints is not None:
            self._constraints.remove()
            self._constraints = None

    def _fractions(self) -> dict[str | None, float]:
        if isinstance(self.sparsity, Mapping):
            return {entry: fraction for entry, fraction in self.sparsity.items()}  # noqa: C416
        return {None: self.sparsity}

    def _groups(self, model: nn.Module) -> list[dict[str, nn.Parameter]]:
        """Targets of each pruner, by name; remembers the selection."""
        entries = list(self._fractions())
        named = [entry for entry in entries if entry is not None]
        self._selection = find_targets(model, named or self.targets, self.ignore)
        groups: list[dict[str, nn.Parameter]] = []
        for entry in entries:
            taken = {name for group in groups for name in group}
            group = self._selection.parameters
            if entry is not None:
                group = find_targets(model, entry, self.ignore).parameters
            groups.append({name: param for name, param in group.items() if name not in taken})
            if not groups[-1]:
                raise ValueError(
                    f"`sparsity` entry {entry!r}: all its weights belong to earlier entries. Put the "
                    "special ones first."
                )
        return groups

    def _pruner(self, sparsity: float) -> Pruner:
        return Pruner(
            sparsity,
            score=self.score,
            scope=self.scope,
            schedule=self.schedule,
            start=self.start,
            end=self.end,
            interval=self.interval,
            min_keep=self.min_keep,
        )
