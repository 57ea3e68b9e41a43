"""Sparse training with regrowth inside any Trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

from torch import nn

from hf_compress.callbacks.masking import MaskingCallback
from hf_compress.pruning.regrowth import RigL
from hf_compress.targets import Target


class RigLCallback(MaskingCallback):
    """RigL (arXiv:1911.11134) inside an unmodified `Trainer`: as sparse from the first step as at the
    last, while the zeros move to where the gradient is smallest.

    sparsity: of each targeted weight alone; the rest of it, `targets` and `ignore` are as in
        `MaskingCallback`. Layer-wise sparsities such as ERK's come as a dict.
    fraction, interval, end: see `hf_compress.pruning.regrowth.RigL`.
    """

    def __init__(
        self,
        sparsity: float | Mapping[str, float],
        *,
        fraction: float = 0.3,
        interval: int = 100,
        end: int | float = 0.75,
        targets: str | Sequence[str] | None = None,
        ignore: str | Sequence[str] | None = None,
    ) -> None:
        self.fraction = fraction
        self.interval = interval
        self.end = end
        super().__init__(sparsity, targets=targets, ignore=ignore)

    def describe(self) -> dict[str, object]:
        return super().describe() | {
            "method": "RigL",
            "paper": "arXiv:1911.11134",
            "scope": "layer",
            "fraction": self.fraction,
            "interval": self.interval,
            "end": self.end,
        }

    def _constraint(
        self,
        sparsity: float | None,
        *,
        targets: Mapping[str, Target] | None = None,
        model: nn.Module | None = None,
    ) -> RigL:
        return RigL(cast(float, sparsity), fraction=self.fraction, interval=self.interval, end=self.end)
