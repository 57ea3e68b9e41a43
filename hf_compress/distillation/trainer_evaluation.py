"""What of a Trainer's evaluation changes when it distils."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from hf_compress.distillation.objective import Objective
from hf_compress.distillation.records import Records


class EvaluationMixin(Trainer):
    """Its losses are means over the items of all batches, and its predictions the student's alone."""

    args: Any
    objective: Objective
    records: Records
    _loss_only = False  # whether the student's logits may be left out

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **generation: Any,
    ) -> tuple[Any, Any, Any]:
        """As the Trainer below does, but for one that generates, which asks the model for its loss."""
        seen = self.records.evaluation.batches
        self._loss_only = prediction_loss_only
        loss, predictions, labels = super().prediction_step(
            model, inputs, prediction_loss_only, ignore_keys, **generation
        )
        if loss is not None and self.records.evaluation.batches == seen:
            with torch.no_grad(), self.compute_loss_context_manager():
                found: Any = self.compute_loss(model, self._prepare_inputs(inputs))
            loss = found.detach()
        return loss, predictions, labels

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As the Trainer below does, with the means over the items in place of its loss."""
        self.records.evaluation.forget()
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        means = self.records.evaluated(agreement=self.objective.agreement, alpha=self.args.alpha)
        if output.metrics is not None:
            output.metrics.update(
                {f"{metric_key_prefix}_{name}": value for name, value in means.items()}
            )
        return output

    def _real_rows(self, batch: Mapping[str, Any]) -> int | None:
        """How many rows of the last evaluation batch do not merely fill it up for the other ranks."""
        state = self.accelerator.gradient_state
        if not state.end_of_dataloader or state.remainder < 1:
            return None
        rows = len(batch[self.objective.head.labels[0]])
        return min(max(state.remainder - self.accelerator.process_index * rows, 0), rows)
