"""What a log or an evaluation tells of many batches."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hf_compress.distillation.tasks.task import Sums


class Totals:
    """The sums of batches on this process. device: where they are added up."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.forget()

    def forget(self) -> None:
        """Begin anew."""
        self.values = torch.zeros(len(Sums._fields), 1, device=self._device)  # (fields, parts)
        self.batches = 0

    def add(self, sums: Sums) -> None:
        values = torch.stack([value.detach().float().reshape(-1) for value in sums])
        self.values = self.values + values.to(self._device)
        self.batches += 1

    def means(self, summed: Callable[[Tensor], Tensor], *, agreement: bool) -> dict[str, float]:
        """Over the items of all processes, of several parts their mean; empty without any item.

        summed: a tensor -> its sum over the processes, all of which call this; agreement: whether that
        means something.
        """
        items, *totals = summed(self.values)
        if not items.sum():
            return {}
        means = [(total / items.clamp(min=1)).mean().item() for total in totals]
        named = dict(zip(("loss_task", "loss_kd", "agreement"), means, strict=True))
        return named if agreement else {name: named[name] for name in ("loss_task", "loss_kd")}
