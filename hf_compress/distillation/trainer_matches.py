"""Where a Trainer takes care of what the matches of a distillation train: their projections."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from hf_compress.distillation.features.matching import FeatureMatching
from hf_compress.optimizers import torch_optimizer


class MatchingMixin(Trainer):
    """They lie beside the student, so that neither DDP nor a checkpoint of the model knows of them."""

    matching: FeatureMatching

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """As the Trainer below does, with a group for each projection of the matches."""
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.matching.projections.weights:
            self.matching.join(torch_optimizer(optimizer))
        return optimizer

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the Trainer below does; the projections get their gradients from all processes."""
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            self.matching.end_step(self._summed, lambda grad: self.accelerator.reduce(grad, "mean"))
        return loss

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            self.matching.save(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self.matching.load(checkpoint)
        super()._load_optimizer_and_scheduler(checkpoint)

    def _summed(self, values: Tensor) -> Tensor:
        return self.accelerator.reduce(values, "sum")
