"""What callbacks share that keep zeros in the weights: groups of targets, life cycle, and the check at
the end."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from hf_compress.callbacks.constraining import ConstrainingCallback
from hf_compress.pruning.masks import ZeroKeeper, check_fractions
from hf_compress.pruning.plan import Plan
from hf_compress.pruning.select import count_kept
from hf_compress.targets import Selection, Target, find_targets, split_targets

logger = logging.get_logger(__name__)


class MaskingCallback(ConstrainingCallback):
    """Zeros in the weights of an unmodified `Trainer`: one constraint for each sparsity.

    sparsity: a fraction; or one for each entry of `targets`, as a dict: `{"re:attention": 0.5,
        "re:intermediate|output": 0.9}`, where a weight that several entries match belongs to the first.
    targets, ignore: class names, module names or "re:" patterns, see
        `hf_compress.targets.find_targets`. By default the Linear and Conv1D layers and experts of
        the backbone; never embeddings, heads, norms, biases, adapters.

    Logs `sparsity`, the fraction of the targeted weights that is zero. Every checkpoint is sparse as
    the log says, and no checkpoint counts as the best before the target is reached. Resuming from a
    checkpoint gives the same weights as never having stopped.

    Raises ValueError when made with a value out of range, and when training begins: for targets that
    match nothing, FSDP1, DeepSpeed, layer-wise or schedule-free optimizers, models packed by
    bitsandbytes or whose weights are frozen under adapters.
    """

    def __init__(
        self,
        sparsity: float | Mapping[str, float] | None,
        *,
        targets: str | Sequence[str] | None,
        ignore: str | Sequence[str] | None,
    ) -> None:
        if isinstance(sparsity, Mapping):
            check_fractions(sparsity, targets)
        self.sparsity = sparsity
        self.targets = targets
        self.ignore = ignore
        # Wrong settings are told here rather than when the training begins.
        self._masks = [self._constraint(fraction) for fraction in self._fractions().values()]
        self._selection = Selection()
        self._found: dict[str, float] = {}

    @abc.abstractmethod
    def _constraint(
        self,
        sparsity: float | None,
        *,
        targets: Mapping[str, Target] | None = None,
        model: nn.Module | None = None,
    ) -> ZeroKeeper:
        """The constraint of one group; with its targets once they are known, and with the model when
        it is to be trained."""

    @property
    def finished(self) -> bool:
        return all(mask.finished for mask in self._masks)

    def measurements(self) -> dict[str, float]:
        total = sum(mask.total for mask in self._masks)
        return {"sparsity": sum(mask.pruned for mask in self._masks) / max(total, 1)}

    @property
    def progress(self) -> float:
        """The part in [0, 1] of the zeros asked that is there. They are counted as training begins."""
        due = sum(mask.due for mask in self._masks)
        return min(sum(mask.pruned for mask in self._masks) / due, 1.0) if due else 1.0

    def describe(self) -> dict[str, object]:
        return {
            "sparsity": dict(self.sparsity) if isinstance(self.sparsity, Mapping) else self.sparsity,
            "weights": self._found,
            "skipped": self._selection.skipped,
        }

    def dry_run(self, model: nn.Module) -> Plan:
        """What would be pruned, what not and why. Print it; nothing is changed.

        Raises ValueError for targets that match nothing or that a pattern does not divide.
        """
        fractions: dict[str, float] = {}
        for sparsity, targets in zip(self._fractions().values(), self._groups(model), strict=True):
            constraint = self._constraint(sparsity, targets=targets)
            fractions |= constraint.fractions({name: t.param for name, t in targets.items()})
        return Plan.of(model, self._selection, fractions)

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
        due = sum(mask.due for mask in self._masks)
        if zeros < due:
            logger.warning(
                f"the model is {zeros / total:.4f} sparse, not {due / total:.4f} as asked: "
                f"{self._why_unfinished(state)}."
            )

    def _why_unfinished(self, state: TrainerState) -> str:
        return (
            f"training ended at step {state.global_step} of {state.max_steps}, before the schedule did"
        )

    def _attach(self, state: TrainerState, model: Any, optimizer: Any) -> None:
        self._masks = []
        for sparsity, targets in zip(self._fractions().values(), self._groups(model), strict=True):
            mask = self._constraint(sparsity, targets=targets, model=model)
            self._masks.append(mask)
            parameters = {name: target.param for name, target in targets.items()}
            self._constrain(state, optimizer, parameters, mask, method="this pruning")

    def _fractions(self) -> dict[str | None, float | None]:
        if isinstance(self.sparsity, Mapping):
            return {entry: fraction for entry, fraction in self.sparsity.items()}  # noqa: C416
        return {None: self.sparsity}

    def _groups(self, model: nn.Module) -> list[dict[str, Target]]:
        """Targets of each sparsity, by name; remembers the selection."""
        if isinstance(self.sparsity, Mapping):
            self._selection, groups = split_targets(model, self.sparsity, self.ignore)
            return list(groups.values())
        self._selection = find_targets(model, self.targets, self.ignore)
        return [self._selection.targets]
