"""One training, several models: the best of each sparsity that a ramp passes through."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch.distributed.tensor import DTensor
from transformers import (
    IntervalStrategy,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.utils import logging

from hf_compress.callbacks.base import CompressionCallback
from hf_compress.callbacks.constraining import ConstrainingCallback
from hf_compress.callbacks.pruning import PruningCallback
from hf_compress.figures import new_figure
from hf_compress.publishing.audit import audit
from hf_compress.publishing.folder import move_into_place, on_main_process, workplace

logger = logging.get_logger(__name__)

INDEX = "family.json"
PICTURE = "family.png"
# Whole weights, blocks and rows are pruned, so a schedule comes no closer to the fraction asked.
ROUNDING = 1e-3


@dataclass(frozen=True)
class Relative:
    """One model of a family. sparsity: of the weights that are pruned; nonzeros and parameters: of all
    weights, counted in the files."""

    folder: str
    sparsity: float
    metric: float
    step: int
    nonzeros: int
    parameters: int


class FamilyCallback(TrainerCallback):
    """Keeps the best model of each level of sparsity, beside the callback that prunes.

        pruning = PruningCallback(0.9)
        family = FamilyCallback(pruning, folder="family")
        Trainer(..., TrainingArguments(..., eval_strategy="steps"), callbacks=[pruning, family])

    A model belongs to the highest level that it has reached, so a level is open from the step at which
    the sparsity gets there until it reaches the next one. At that first step an evaluation is added to
    those of the Trainer; of all evaluated in the level the best is kept. The ramp decides how long a
    level is open: `end=1.0` or `schedule="linear"` give the low ones more time.

    pruning: the callback that prunes; it logs `sparsity`.
    levels: sparsities in (0, 1) that rise. The last may be the target, not more.
    folder: gets a folder for each level, which plain `from_pretrained` loads, `family.json` with a
        `Relative` for each, and `family.png`, the metric over the sparsity.

    Better is what the Trainer takes for better: `metric_for_best_model` and `greater_is_better`, by
    default a lower `loss`. Resuming goes on with the family in `folder`; a new training replaces it.

    Raises ValueError when made for levels that are not as above or above the target, and for a
    `pruning` that logs no sparsity; when training begins ValueError without evaluations, without
    `pruning` among its callbacks or for sharded weights, and FileExistsError for a `folder` that holds
    anything else.
    """

    def __init__(
        self,
        pruning: CompressionCallback,
        *,
        folder: str | Path,
        levels: Sequence[float] = (0.5, 0.6, 0.7, 0.8, 0.9),
    ) -> None:
        if not isinstance(pruning, CompressionCallback) or "sparsity" not in pruning.measurements():
            raise ValueError(
                f"`pruning` is a {type(pruning).__name__}, which logs no `sparsity`: pass the "
                "PruningCallback that is in `callbacks` too."
            )
        several = isinstance(levels, Sequence) and len(levels) > 0
        rising = several and list(levels) == sorted({*levels})
        if not rising or not 0 < levels[0] <= levels[-1] < 1:
            raise ValueError(
                f"`levels` is {levels!r}: give fractions in (0, 1) that rise, such as (0.5, 0.8)."
            )
        target = pruning.sparsity if isinstance(pruning, PruningCallback) else None
        if isinstance(target, float | int) and levels[-1] > target:
            raise ValueError(
                f"`levels` ends with {levels[-1]}, but the pruning with {target}: raise its sparsity, "
                "or leave out what it does not reach."
            )
        self.pruning = pruning
        self.folder = Path(folder)
        self.levels = list(levels)
        self._level_before: float | None = None
        self._training = False
        self._family: dict[float, Relative] = {}

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: object,
    ) -> None:
        if args.eval_strategy == IntervalStrategy.NO:
            raise ValueError(
                "a family is chosen among evaluations: set `eval_strategy` to 'steps' or 'epoch'."
            )
        if any(isinstance(param, DTensor) for param in model.parameters()):
            raise ValueError(
                "the weights are sharded, and a callback cannot save them: use DDP instead of FSDP."
            )
        self._training = True
        self._family = {}
        on_main_process(lambda: self._open_folder(resumed=state.global_step > 0))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        # Not when the training begins: it may come after this callback in the list.
        if isinstance(self.pruning, ConstrainingCallback) and not self.pruning.attached:
            raise ValueError(
                f"the {type(self.pruning).__name__} of this family is not in the training: give both "
                "to Trainer, callbacks=[pruning, family]."
            )
        self._level_before = self._level()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if self._level() != self._level_before:
            control.should_evaluate = True
            # Else, if it is the best, Trainer would look for a checkpoint that was not written.
            control.should_save = control.should_save or args.load_best_model_at_end

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        processing_class: Any = None,
        metrics: Mapping[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        level, metric = self._level(), (metrics or {}).get(_metric_name(args))
        # After the training other models may be evaluated, or this one changed.
        if not self._training or not state.is_world_process_zero or level is None or metric is None:
            return
        best = self._family.get(level)
        if best is None or (metric > best.metric if args.greater_is_better else metric < best.metric):
            self._save(level, metric, state.global_step, model, processing_class)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._training = False
        if not state.is_world_process_zero:
            return
        if self._family:
            self._draw(state, _metric_name(args))
        if missing := [level for level in self.levels if level not in self._family]:
            logger.warning(
                f"no model was saved at {missing}: the sparsity went past between two steps, or did "
                f"not get there, or {_metric_name(args)!r} was not evaluated."
            )

    def _level(self) -> float | None:
        """The highest level that the model has reached."""
        sparsity = self.pruning.measurements()["sparsity"]
        return max((level for level in self.levels if sparsity >= level - ROUNDING), default=None)

    def _open_folder(self, *, resumed: bool) -> None:
        index = self.folder / INDEX
        if not index.exists():
            if self.folder.exists() and any(self.folder.iterdir()):
                raise FileExistsError(f"{self.folder} holds something else: choose another `folder`.")
            self.folder.mkdir(parents=True, exist_ok=True)
            return
        earlier = {float(k): Relative(**v) for k, v in json.loads(index.read_text()).items()}
        if resumed:
            self._family = {level: earlier[level] for level in self.levels if level in earlier}
            return
        index.unlink()
        (self.folder / PICTURE).unlink(missing_ok=True)
        for relative in earlier.values():
            shutil.rmtree(self.folder / relative.folder, ignore_errors=True)

    def _save(self, level: float, metric: float, step: int, model: Any, processing_class: Any) -> None:
        folder = self.folder / f"sparse{100 * level:g}"
        place = workplace(folder)
        shutil.rmtree(place, ignore_errors=True)  # what an interrupted run left
        model.save_pretrained(place)
        if processing_class is not None:
            processing_class.save_pretrained(place)
        found = audit(place)
        move_into_place(folder)
        self._family[level] = Relative(
            folder=folder.name,
            sparsity=self.pruning.measurements()["sparsity"],
            metric=metric,
            step=step,
            nonzeros=found.nonzeros,
            parameters=found.parameters,
        )
        table = {str(level): asdict(self._family[level]) for level in sorted(self._family)}
        unfinished = self.folder / f".{INDEX}"
        unfinished.write_text(json.dumps(table, indent=1) + "\n")
        unfinished.replace(self.folder / INDEX)

    def _draw(self, state: TrainerState, metric: str) -> None:
        evaluated = [
            (row["sparsity"], row[metric])
            for row in state.log_history
            if {"sparsity", metric} <= {*row}
        ]
        best = [(self._family[level].sparsity, self._family[level].metric) for level in self._family]
        figure = new_figure(7, 4)
        axes = figure.add_subplot()
        axes.plot(*zip(*evaluated, strict=True), ".", color="grey", label="evaluated")
        axes.plot(*zip(*sorted(best), strict=True), "o-", color="tab:blue", label="kept")
        axes.set(xlabel="sparsity of the targeted weights", ylabel=metric)
        axes.legend()
        figure.savefig(self.folder / PICTURE)


def _metric_name(args: TrainingArguments) -> str:
    """As Trainer names it in the metrics."""
    name = args.metric_for_best_model or "loss"
    return name if name.startswith("eval_") else f"eval_{name}"
