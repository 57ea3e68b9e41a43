"""Prunes whole neurons and heads while any Trainer trains the model."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from hf_compress.callbacks.constraining import ConstrainingCallback
from hf_compress.pruning.structure.architectures import Kind
from hf_compress.pruning.structure.choice import check_fraction, check_round_to, count_kept
from hf_compress.pruning.structure.config import smaller_config
from hf_compress.pruning.structure.pruner import UnitPruner
from hf_compress.pruning.structure.units import find_units
from hf_compress.schedules import Schedule, Shape

logger = logging.get_logger(__name__)


class StructuredPruningCallback(ConstrainingCallback):
    """Takes feed-forward neurons and attention heads away inside an unmodified `Trainer`.

    ffn, heads: the fraction in [0, 1) of each that goes, the same in every layer; see
        `hf_compress.pruning.structure.removal.prune_structure` for what must be whole.
    schedule: "cubic", "linear", "cosine", "exponential", "step", "constant", or a function of
        progress in [0, 1].
    start, end: when units begin to go and when all have: optimizer steps (int), or fractions of the
        training (float in [0, 1]). The rest of the training recovers.
    round_to: as many neurons stay as a multiple of it.

    What goes is zeroed during the training, so that the optimizer and the checkpoints keep their
    shapes; afterwards `shrink(trainer.model)` gives the smaller model that computes the same:

        callback = StructuredPruningCallback(ffn=0.5)
        trainer = Trainer(model, args, train_dataset=data, callbacks=[callback])
        trainer.train()
        shrink(trainer.model).save_pretrained("smaller")

    Layers, experts and hidden features are removed before the training, by `prune_structure`: every
    weight holds a part of each hidden feature, and takes one constraint of a kind.

    Logs `ffn_sparsity` and `heads_sparsity`, the fractions that are gone. No checkpoint counts as the
    best before the target is reached. Resuming gives the same weights as never having stopped.

    Raises ValueError when made with a value out of range, and when training begins: for models that
    cannot lose these units (saying what they can), a schedule that cannot finish, a checkpoint
    without its state, and where weights cannot be constrained (FSDP, DeepSpeed, packed or frozen
    weights, adapters).
    """

    def __init__(
        self,
        *,
        ffn: float = 0.0,
        heads: float = 0.0,
        schedule: str | Shape = "cubic",
        start: int | float = 0.1,
        end: int | float = 0.6,
        round_to: int = 1,
    ) -> None:
        fractions: dict[Kind, float] = {"ffn": ffn, "heads": heads}
        for kind, fraction in fractions.items():
            check_fraction(kind, fraction)
        if ffn == heads == 0.0:
            raise ValueError(
                "`ffn` and `heads` are 0, so there is nothing to prune: pass a fraction in (0, 1) for "
                "one or both, such as ffn=0.5."
            )
        check_round_to(round_to)
        Schedule(final=1.0, shape=schedule, start=start, end=end)  # wrong times are told here
        self.fractions = {kind: fraction for kind, fraction in fractions.items() if fraction > 0.0}
        self.schedule = schedule
        self.start = start
        self.end = end
        self.round_to = round_to
        self._pruners: dict[Kind, UnitPruner] = {}

    @property
    def finished(self) -> bool:
        return bool(self._pruners) and all(pruner.finished for pruner in self._pruners.values())

    def measurements(self) -> dict[str, float]:
        return {f"{kind}_sparsity": pruner.sparsity for kind, pruner in self._pruners.items()}

    def describe(self) -> dict[str, object]:
        return {
            "method": "structured pruning",
            "paper": "arXiv:1906.10771",
            "ffn": self.fractions.get("ffn", 0.0),
            "heads": self.fractions.get("heads", 0.0),
            "schedule": self.schedule if isinstance(self.schedule, str) else self.schedule.__name__,
            "start": self.start,
            "end": self.end,
            "round_to": self.round_to,
            **self.measurements(),
        }

    def _attach(self, state: TrainerState, model: Any, optimizer: Any) -> None:
        self._pruners = self._find(model)
        for kind, pruner in self._pruners.items():
            self._constrain(state, optimizer, pruner.parameters, pruner, method=f"pruning {kind}")

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        self._detach()
        for pruner in self._pruners.values():
            pruner.count()  # the best checkpoint may have been loaded
        if not self.finished:
            logger.warning(
                f"not as many units have gone as asked ({self.fractions}), but {self.measurements()}: "
                f"training ended at step {state.global_step} of {state.max_steps}, before the schedule."
            )

    def _find(self, model: PreTrainedModel) -> dict[Kind, UnitPruner]:
        found = {kind: find_units(model, [kind]) for kind in self.fractions}
        smaller_config(
            model,
            {
                u.name: range(count_kept(u, self.fractions[kind], self.round_to))
                for kind, units in found.items()
                for u in units
            },
        )
        return {
            kind: UnitPruner(
                units,
                self.fractions[kind],
                schedule=self.schedule,
                start=self.start,
                end=self.end,
                round_to=self.round_to,
            )
            for kind, units in found.items()
        }
