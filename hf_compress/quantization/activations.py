"""Layers that are trained with the inputs they will have as integers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_compress.quantization.grids import Scheme, fake_quantize, fit
from hf_compress.targets import Target


class InputQuantizer:
    """Fake-quantizes the inputs of layers by forward pre-hooks, until `remove()`.

    Each token, the features along the last dimension, has a symmetric grid of its own, "absmax" in
    `hf_compress.quantization.grids.Scheme`, found anew in each forward: nothing is calibrated or kept.
    The gradient passes straight through. The module tree and the names of the weights stay as they are.

    bits: 2 to 8. `enabled` turns it off and on.
    Raises ValueError for stacked experts, and for `bits` out of range.
    """

    def __init__(self, model: nn.Module, targets: Mapping[str, Target], *, bits: int = 8) -> None:
        self.enabled = True
        self._scheme = Scheme(bits=bits, grid="absmax")
        check_inputs(targets)
        owners = dict.fromkeys(target.owner for target in targets.values())
        self._handles = [
            model.get_submodule(owner).register_forward_pre_hook(self._quantize) for owner in owners
        ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _quantize(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        return (_StraightThrough.apply(args[0], self._scheme), *args[1:]) if self.enabled else None


def check_inputs(targets: Mapping[str, Target]) -> None:
    """Raises ValueError for stacked experts: no hook sees what each of them gets."""
    for target in targets.values():
        if target.stacked:
            raise ValueError(
                f"{target.name} holds stacked experts, whose inputs no hook sees: leave it out by "
                "`ignore`, or leave `activations` out."
            )


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, scheme: Scheme) -> Tensor:
        return fake_quantize(tokens, fit(tokens, scheme))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None
