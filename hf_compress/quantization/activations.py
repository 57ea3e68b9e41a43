"""Layers that are trained with the inputs they will have as integers."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from hf_compress.quantization.grids import Grid, fake_quantize
from hf_compress.quantization.schemes import Scheme, fit
from hf_compress.targets import Target


class InputQuantizer:
    """Fake-quantizes the inputs of layers by forward pre-hooks, until `remove()`.

    bits: 2 to 8.
    grids: by the name of its weight a fixed grid for all inputs of a layer, whose scale and zero point
        have no dimensions, as `hf_compress.quantization.calibrated.calibrated_grids` finds it. In a
        layer without one each token, the features along the last dimension, has a symmetric grid of
        its own, "absmax" in `hf_compress.quantization.schemes.Scheme`, found anew in each forward.

    A fixed grid is applied as compressed-tensors does it, in the dtype of the inputs, so that an
    exported model computes what was trained. The gradient passes straight through, but not where a
    fixed grid clips. The module tree and the names of the weights stay as they are. `enabled` turns it
    off and on; `grids` may be replaced.

    Raises ValueError for stacked experts, and for `bits` out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Mapping[str, Target],
        *,
        bits: int = 8,
        grids: Mapping[str, Grid] | None = None,
    ) -> None:
        self.enabled = True
        self.grids = grids or {}
        self._scheme = Scheme(bits=bits, grid="absmax")
        check_inputs(targets)
        self._handles = [
            model.get_submodule(target.owner).register_forward_pre_hook(partial(self._quantize, name))
            for name, target in targets.items()
        ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _quantize(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not self.enabled:
            return None
        return (_FakeQuantize.apply(args[0], self.grids.get(name), self._scheme), *args[1:])


def check_inputs(targets: Mapping[str, Target]) -> None:
    """Raises ValueError for stacked experts: no hook sees what each of them gets."""
    for target in targets.values():
        if target.stacked:
            raise ValueError(
                f"{target.name} holds stacked experts, whose inputs no hook sees: leave it out by "
                "`ignore`, or leave `activations` out."
            )


class _FakeQuantize(torch.autograd.Function):
    # Not torch.fake_quantize_per_tensor_affine, which makes a number of NaN and so hides it.

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, grid: Grid | None, scheme: Scheme) -> Tensor:
        if grid is None:
            ctx.save_for_backward(None)
            return fake_quantize(inputs, fit(inputs, scheme)).to(inputs.dtype)
        values, beyond = _on_fixed_grid(inputs, grid)
        ctx.save_for_backward(beyond)
        return values.to(inputs.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (beyond,) = ctx.saved_tensors
        gradient = gradients[0]
        return gradient if beyond is None else gradient.masked_fill(beyond, 0), None, None


def _on_fixed_grid(inputs: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """The nearest values of the grid, and a mask of the inputs that lie beyond its nearest code."""
    # A dimension, since a tensor without one would not take part in the choice of the dtype.
    scale, zero_point = grid.scale.view(1), cast(Tensor, grid.zero_point).view(1)
    # Divided, and the zero point added before rounding: of weights neither is so.
    codes = (inputs / scale).add_(zero_point.to(inputs.dtype)).round_()
    beyond = (codes < grid.lowest).logical_or_(codes > grid.highest)
    codes = codes.clamp_(grid.lowest, grid.highest).to(scale.dtype)
    return codes.sub_(zero_point).mul_(scale), beyond
