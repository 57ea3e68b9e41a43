"""What a training and its evaluations have to tell of their losses."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from hf_compress.distillation.tasks.task import Sums
from hf_compress.distillation.totals import Totals

logger = logging.getLogger(__name__)


class Records:
    """Totals on this process: of the training, apart for what its student wrote, and of an evaluation.

    device: where they are added up; summed: as in `Totals.means`; differs: whether the teacher needs
    no look at whether it differs from the student at all.
    """

    def __init__(
        self, device: torch.device, summed: Callable[[Tensor], Tensor], *, differs: bool
    ) -> None:
        self.train = Totals(device)
        self.on_policy = Totals(device)
        self.evaluation = Totals(device)
        self._summed = summed
        self._differs = differs

    def add(self, sums: Sums, *, written: bool) -> None:
        """Of a batch of the training. written: by the student itself."""
        (self.on_policy if written else self.train).add(sums)
        if not self._differs and sums.items.sum() > 0:
            self._differs = True
            if sums.distillation.sum() == 0:
                logger.warning(
                    "The teacher gives exactly the student's outputs on the first batch, so there is "
                    "nothing to learn from it. Is it the model you meant?"
                )

    def trained(self, *, agreement: bool) -> dict[str, float]:
        """The means since `forget`, over all processes; agreement: as in `Totals.means`."""
        means = self.train.means(self._summed, agreement=agreement)
        written = self.on_policy.means(self._summed, agreement=agreement)
        return means | {f"on_policy_{k}": written[k] for k in written if k != "loss_task"}

    def evaluated(self, *, agreement: bool, alpha: float) -> dict[str, float]:
        """The means of the evaluation, and its `loss` mixed by `alpha`; empty without any item."""
        means = self.evaluation.means(self._summed, agreement=agreement)
        if means:
            # Trainer's own loss is a mean of batch means, which depends on the evaluation batch size.
            means["loss"] = (1 - alpha) * means["loss_task"] + alpha * means["loss_kd"]
        return means

    def forget(self) -> None:
        """The training is told of anew."""
        self.train.forget()
        self.on_policy.forget()
