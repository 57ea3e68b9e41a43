"""Grids that a training begins with, instead of fitting its own."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from hf_compress.distributed import cut_as, local
from hf_compress.quantization.grids import Grid, scale_shape
from hf_compress.quantization.schemes import Scheme
from hf_compress.targets import Target


def check_given(
    grids: Mapping[str, Grid],
    parameters: Mapping[str, nn.Parameter],
    targets: Mapping[str, Target],
    scheme: Scheme,
) -> None:
    """Raises ValueError where `grids` are not those of `parameters`, or not of `scheme`."""
    if other := grids.keys() ^ parameters.keys():
        name = sorted(other)[0]
        where = "is in `grids` and no target" if name in grids else "is a target and not in `grids`"
        raise ValueError(
            f"{name} {where}: pass the `targets` and `ignore` with which they were found, and the same "
            "model."
        )
    for name, grid in grids.items():
        if grid.bits != scheme.bits:
            raise ValueError(
                f"the grid given for {name} has {grid.bits} bits: pass `bits={grid.bits}`, or several "
                "widths that begin with it."
            )
        if (grid.zero_point is None) is not scheme.symmetric:
            raise ValueError(
                f"the grid given for {name} has {'no ' if grid.zero_point is None else ''}zero points: "
                f"pass `symmetric={grid.zero_point is None}`."
            )
        weight = parameters[name]
        shape = scale_shape(weight, input_dim=targets[name].input_dim, group_size=scheme.group_size)
        if grid.scale.shape != shape:
            raise ValueError(
                f"the grid given for {name} has scales of shape {tuple(grid.scale.shape)}, and "
                f"`group_size={scheme.group_size!r}` asks for {tuple(shape)}: pass that with which it "
                "was found."
            )
        if grid.scale.dtype != weight.dtype:
            raise ValueError(
                f"the grid given for {name} is {grid.scale.dtype} and the weight {weight.dtype}: find "
                "it on the model as it is trained."
            )


def this_ranks(weight: Tensor, grid: Grid) -> Grid:
    """A copy of this rank's part of the grid of `weight`, where the weight lies."""

    def part(tensor: Tensor) -> Tensor:
        return cut_as(weight, tensor.to(local(weight).device)).clone()

    zero_point = None if grid.zero_point is None else part(grid.zero_point)
    return Grid(scale=part(grid.scale), zero_point=zero_point, bits=grid.bits)
