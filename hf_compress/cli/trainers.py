"""Trainers of one dense model and of the candidates that are made of it."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    set_seed,
)

from hf_compress.callbacks.pruning import PruningCallback
from hf_compress.callbacks.quantization import QuantizationCallback
from hf_compress.choosing.building import smaller, texts_within
from hf_compress.choosing.candidates import Candidate
from hf_compress.cli.arguments import CompressArguments
from hf_compress.cli.data import first_rows
from hf_compress.cli.inputs import Processor, collator_of, prepared
from hf_compress.cli.judging import Splits, compute_scores
from hf_compress.cli.tasks import load_model
from hf_compress.distillation.arguments import DistillationArguments
from hf_compress.distillation.cache.precompute import precompute_teacher
from hf_compress.distillation.trainer import DistillationTrainer
from hf_compress.pruning.vocabulary.prune import prune_vocabulary

CALIBRATION = 128  # training rows by whose gradients layers, neurons and heads are scored


@dataclass(frozen=True)
class Base:
    """A dense model, as it is or with its vocabulary cut, and rows for it."""

    model: PreTrainedModel
    processor: Processor
    train: Dataset
    validation: Dataset
    test: Dataset


class Trainers:
    """dense: folder of the dense model. scratch: one that trainings may write to."""

    def __init__(
        self,
        arguments: CompressArguments,
        training: DistillationArguments,
        splits: Splits,
        processor: Processor,
        *,
        dense: Path,
        scratch: Path,
    ) -> None:
        self.arguments, self.training, self.splits = arguments, training, splits
        self.processor, self.place, self.scratch = processor, dense, scratch

    @lru_cache(maxsize=2)  # noqa: B019  # as long as the one search that it is for
    def base(self, *, vocabulary: bool) -> Base:
        """The dense model with all of its vocabulary, or with that of what it reads of the training
        texts."""
        model: Any = load_model(replace(self.arguments, model=str(self.place)), self.splits.names)
        processor: Any = self.processor
        if vocabulary:
            texts = self.splits.train[self.arguments.text_column]
            seen = texts_within(processor, texts, self.arguments.max_length)
            model, processor = prune_vocabulary(model, processor, seen)
        return self.based(model, processor)

    def based(self, model: PreTrainedModel, processor: Processor) -> Base:
        """A model with the rows as its tokenizer, or another processor, makes them."""
        raw = (self.splits.train, self.splits.validation, self.splits.test)
        names = self.splits.names
        return Base(
            model, processor, *(prepared(rows, processor, self.arguments, names) for rows in raw)
        )

    @lru_cache(maxsize=2)  # noqa: B019  # the same
    def taught(self, *, vocabulary: bool) -> Base:
        """`base`, and beside its rows what the model answers: asked once, for all trainings."""
        base = self.base(vocabulary=vocabulary)
        model: Any = base.model

        def ask(rows: Dataset) -> Dataset:
            return precompute_teacher(
                rows,
                model.to(self.training.device),
                data_collator=self._collator(base.processor),
                batch_size=self.training.eval_batch_size,
                folder=self.scratch / "asked",
            )

        rows = (ask(part) for part in (base.train, base.validation, base.test))
        return Base(base.model, base.processor, *rows)

    def base_of(self, candidate: Candidate) -> Base:
        """What it is made of and learns from."""
        # Answers about every token of a vocabulary would fill the disk.
        kept = candidate.distil and self.splits.names is not None
        return (self.taught if kept else self.base)(vocabulary=candidate.vocabulary)

    def of_candidate(self, candidate: Candidate, steps: int) -> Trainer:
        """From the dense weights, always in the same way."""
        set_seed(self.training.seed)
        base = self.base(vocabulary=candidate.vocabulary)
        model = smaller(candidate, base.model, self.calibration(base))
        if model is base.model:
            model = copy.deepcopy(model).requires_grad_(True)  # a teacher is frozen
        callbacks: list[Any] = []
        if candidate.sparsity:
            callbacks.append(PruningCallback(candidate.sparsity))
        if candidate.bits is not None:
            callbacks.append(QuantizationCallback(candidate.bits, group_size=candidate.group_size))
        teacher: PreTrainedModel | str | None = None
        if candidate.distil:
            teacher = base.model if self.splits.names is None else "cached"
        base = self.base_of(candidate)
        return self.of_model(base, model, steps, callbacks=callbacks, teacher=teacher)

    def of_model(
        self,
        base: Base,
        model: PreTrainedModel,
        steps: int,
        *,
        callbacks: list[Any] | None = None,
        teacher: PreTrainedModel | str | None = None,
    ) -> Trainer:
        """Of any model that reads the rows of `base`; it evaluates those of the validation."""
        settings: dict[str, Any] = {
            "args": replace(
                self.training,
                output_dir=str(self.scratch),
                max_steps=steps,
                eval_strategy="no",
                save_strategy="no",
                load_best_model_at_end=False,
                push_to_hub=False,
                report_to="none",
            ),
            "train_dataset": base.train,
            "eval_dataset": base.validation,
            "processing_class": base.processor,
            "data_collator": self._collator(base.processor),
            "compute_metrics": None if self.splits.names is None else compute_scores,
            "callbacks": callbacks,
        }
        trainer = (
            Trainer(model, **settings)
            if teacher is None
            else DistillationTrainer(model, teacher=teacher, **settings)
        )
        # There are many trainings, of which the search tells in a line each.
        for callback in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(callback)
        return trainer

    def _collator(self, processor: Processor) -> Any:
        return collator_of(processor, labelled=self.splits.names is not None)

    def calibration(self, base: Base) -> list[dict[str, Tensor]]:
        """Labelled batches of some training rows."""
        return self.batches(base, first_rows(base.train, CALIBRATION))

    def batches(self, base: Base, rows: Dataset) -> list[dict[str, Tensor]]:
        """`rows`, one of those of `base`, as a Trainer batches them."""
        collate, size = self._collator(base.processor), self.training.per_device_train_batch_size
        starts = range(0, len(rows), size)
        cuts = [range(start, min(start + size, len(rows))) for start in starts]
        return [dict(collate([rows[place] for place in cut])) for cut in cuts]
