"""Fixed grids for the inputs of layers: found on calibration data, kept with the optimizer's state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers.utils import logging

from hf_compress.constraint import Constraint
from hf_compress.frozen import evaluating
from hf_compress.member import Member
from hf_compress.optimizers import torch_optimizer
from hf_compress.quantization.grids import Grid
from hf_compress.quantization.schemes import Scheme, fit
from hf_compress.targets import Target


@torch.no_grad()
def calibrated_grids(
    model: nn.Module,
    targets: Mapping[str, Target],
    batches: Sequence[Mapping[str, Tensor]],
    *,
    bits: int = 8,
) -> dict[str, Grid]:
    """For each target the grid of all inputs of its layer, scale and zero point without dimensions.

    It is affine, from the lowest to the highest input over all of `batches`, padding included, and of
    the ranks where there are several; the model is run in evaluation mode.

    batches: mappings of tensors as the model's forward takes them. On each rank as many.
    bits: 2 to 8.

    Raises ValueError for layers whose inputs the batches do not reach, are not finite or are all zero.
    """
    # Minus the lowest and the highest: one maximum reduces both.
    ranges = {
        name: torch.full((2,), -torch.inf, device=target.param.device)
        for name, target in targets.items()
    }

    def see(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        low, high = args[0].detach().float().aminmax()
        ranges[name] = torch.maximum(ranges[name], torch.stack([-low, high]))

    handles = [
        model.get_submodule(target.owner).register_forward_pre_hook(partial(see, name))
        for name, target in targets.items()
    ]
    device = next(iter(targets.values())).param.device
    try:
        with evaluating(model):
            for batch in logging.tqdm(batches, desc="Calibrating", unit="batch"):
                model(**{key: value.to(device) for key, value in batch.items()})
    finally:
        for handle in handles:
            handle.remove()
    if dist.is_available() and dist.is_initialized():
        for both in ranges.values():
            dist.all_reduce(both, op=dist.ReduceOp.MAX)
    scheme = Scheme(bits=bits, symmetric=False, grid="minmax")
    grids = {}
    for name, both in ranges.items():
        _check_range(name, both)
        ends = torch.stack([-both[0], both[1]])
        # The optimizer's checkpoint would change any dtype but the weight's.
        grids[name] = fit(ends.to(targets[name].param.dtype), scheme)
    return grids


class InputGrids(Constraint):
    """Keeps the grids of the inputs beside the weights of their layers, in the optimizer's state, so
    that a resumed training has the same. It leaves the weights alone.

    Raises ValueError when attached to a checkpoint whose inputs have other bits.
    """

    order = 2
    needs_latent = False

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self._members: Sequence[Member] = ()
        self._grids: dict[str, Grid] = {}

    @property
    def grids(self) -> dict[str, Grid]:
        """By the name of the weight; empty before any were kept."""
        return dict(self._grids)

    def keep(self, grids: Mapping[str, Grid]) -> None:
        """Keep these, one for each weight, instead."""
        self._grids = dict(grids)
        for member in self._members:
            grid = grids[member.name]
            member["input_scale"] = grid.scale
            member["input_zero_point"] = cast(Tensor, grid.zero_point)
            member["input_bits"] = grid.scale.new_tensor(grid.bits)

    def begin(self, members: Sequence[Member]) -> None:
        self._members = members
        for member in members:
            if "input_scale" not in member:
                continue
            bits = int(member["input_bits"].item())
            if bits != self.bits:
                raise ValueError(
                    f"the checkpoint holds grids of {bits} bits for the inputs of {member.name}: "
                    f"resume with `activations={bits}`."
                )
            self._grids[member.name] = Grid(
                scale=member["input_scale"], zero_point=member["input_zero_point"], bits=bits
            )

    def observe(self, members: Sequence[Member]) -> None:
        """Nothing: inputs are seen when calibrating only."""

    def update(self, members: Sequence[Member]) -> None:
        """Nothing, likewise."""

    def project_(self, members: Sequence[Member]) -> None:
        """Nothing: any weight will do."""


def check_no_grids(
    optimizer: Optimizer | AcceleratedOptimizer, parameters: Mapping[str, nn.Parameter]
) -> None:
    """Raises ValueError where the optimizer's checkpoint holds grids for inputs, by a training that is
    now gone on with without: what the weights were fitted to would change without a word."""
    optimizer = torch_optimizer(optimizer)
    for name, param in parameters.items():
        member = Member(name, param, optimizer)
        if "input_scale" in member:
            bits = int(member["input_bits"].item())
            raise ValueError(
                f"the checkpoint holds a fixed grid of {bits} bits for the inputs of {name}: resume "
                f"with `activations={bits}` and the `calibration` that it was trained with."
            )


def _check_range(name: str, both: Tensor) -> None:
    layer = name.rpartition(".")[0]
    if both.isneginf().all():
        raise ValueError(
            f"the calibration does not reach {layer}, so the range of its inputs is not known: give "
            "batches that do, or leave it out by `ignore`."
        )
    if not both.isfinite().all():
        raise ValueError(
            f"the calibration gives {layer} inputs that are not finite: mend the model or the batches; "
            "if it is in float16, load it in bfloat16 or float32."
        )
    if not both.any():
        raise ValueError(
            f"the calibration gives {layer} nothing but zeros, which have no range: give other "
            "batches, or leave it out by `ignore`."
        )
