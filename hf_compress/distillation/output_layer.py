"""The last layer of a language model, which turns hidden states into logits."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_compress.distillation.losses import precise


@dataclass(frozen=True, kw_only=True)
class OutputLayer:
    """Hidden states to logits: softcap * tanh(scale * (hidden @ weight.T + bias) / softcap).

    weight: (classes, width); bias: (classes,) or None; scale: as in Cohere and Granite; softcap: as in
    Gemma 2, None where logits have no bounds; dtype: in which the product is computed, None is that of
    the weight.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    dtype: torch.dtype | None = None

    def under_autocast(self) -> OutputLayer:
        """Computed in the precision of autocast where that is on now."""
        kind = self.weight.device.type
        if not torch.is_autocast_enabled(kind):
            return self
        return replace(self, dtype=torch.get_autocast_dtype(kind))

    def ready(self) -> OutputLayer:
        """Converted to `dtype`, and without a graph."""
        bias = None if self.bias is None else self.bias.detach().to(self.dtype)
        return replace(self, weight=self.weight.detach().to(self.dtype), bias=bias)

    def logits(self, hidden: Tensor) -> Tensor:
        """(items, width) -> (items, classes), in fp32 or better but for the product itself."""
        logits = precise(F.linear(hidden.to(self.weight.dtype), self.weight, self.bias))
        if self.scale != 1:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def slope(self, slope: Tensor, logits: Tensor) -> Tensor:
        """How a loss changes with hidden @ weight.T + bias, by how it changes with `logits`."""
        if self.softcap is not None:
            slope = slope * (1 - (logits / self.softcap) ** 2)
        return slope if self.scale == 1 else slope * self.scale
