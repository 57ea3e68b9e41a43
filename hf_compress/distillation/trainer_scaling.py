"""A Trainer that looks at its own loss: whether it depends on how a batch is cut."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from datasets import Dataset
from torch import Tensor
from transformers import Trainer

from hf_compress.distillation.objective import Objective
from hf_compress.distillation.scaling import Scaling, measure_scaling, tolerance_of


class ScalingMixin(Trainer):
    """Measures it on a few rows, without training."""

    args: Any
    model: Any
    objective: Objective

    def check_scaling(self, rows: int = 8) -> Scaling:
        """The loss and the norm of its gradient for the first `rows` rows of the train dataset, cut
        into batches in several ways, printed as a table and returned.

        They agree where the loss is right. What makes them differ: a model or a collator by which a row
        depends on the padding or on the other rows of its batch. Dropout is off, normalisation over
        batches on its running averages; `matches` and the processes are left out. Model, gradients,
        optimizer, logs and random states are afterwards as they were.

        Raises ValueError without at least two rows and a label in them.
        """
        examples, collate = self._first_rows(rows)
        half = self.accelerator.mixed_precision != "no"
        scaling = measure_scaling(
            self.model, examples, collate, self._losses, tolerance=tolerance_of(self.model, half=half)
        )
        if self.is_world_process_zero():
            print(scaling)
        return scaling

    def _first_rows(self, rows: int) -> tuple[list[Any], Any]:
        """Of the train dataset, and what collates them: both without unused columns."""
        dataset: Any = self.train_dataset
        collate: Any = self.data_collator
        if isinstance(dataset, Dataset):
            dataset = self._remove_unused_columns(dataset)
        else:
            collate = self._get_collator_with_removed_columns(collate)
        examples = [] if dataset is None else list(islice(dataset, rows))
        if len(examples) < 2:
            raise ValueError(
                f"There are {len(examples)} rows to cut: pass a `train_dataset` and at least 2 `rows`."
            )
        return examples, collate

    def _losses(self, batches: Sequence[Mapping[str, Any]]) -> Iterator[Tensor]:
        return self.objective.losses(
            self.model,
            [self._prepare_inputs(dict(batch)) for batch in batches],
            divergence=self.args.make_divergence(),
            alpha=self.args.alpha,
            device=self.args.device,
        )
