"""Learned matrices between the widths of a student and its teacher, which are no part of either."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hf_compress.distillation.features.terms import Term


class Projections:
    """A matrix (teacher's width, student's width) in fp32 for each pair of layers that needs one.

    They start orthogonal, equal on all processes, without touching the random state of the training.
    Each process holds all of them: `average_gradients_` takes the place of what DDP does for a model.
    """

    def __init__(self, terms: Iterable[Term], device: torch.device, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.weights: dict[str, nn.Parameter] = {}
        self._rates: dict[str, float | None] = {}
        for term in terms:
            for number in range(len(term.pairs) if term.widths else 0):
                assert term.widths is not None
                weight = torch.empty(term.widths[1], term.widths[0])
                nn.init.orthogonal_(weight, generator=generator)
                name = f"{term.name}.{number}"
                self.weights[name] = nn.Parameter(weight.to(device))
                self._rates[name] = term.match.learning_rate

    def join(self, optimizer: Optimizer) -> None:
        """Let `optimizer` train them too, without weight decay; once, however often it is called."""
        known = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        for name, weight in self.weights.items():
            if weight not in known:
                rate = self._rates[name]
                group: dict[str, Any] = {"params": [weight], "weight_decay": 0.0}
                optimizer.add_param_group(group if rate is None else {**group, "lr": rate})

    def zero_gradients_(self) -> None:
        for weight in self.weights.values():
            weight.grad = None

    def average_gradients_(self, mean: Callable[[Tensor], Tensor]) -> None:
        """mean: over all processes."""
        for weight in self.weights.values():
            if weight.grad is not None:
                weight.grad = mean(weight.grad)
