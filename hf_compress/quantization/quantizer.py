"""The constraint that keeps weights on an integer grid while they are trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from hf_compress.constraint import TimedConstraint, check_loaded
from hf_compress.distributed import local, placed_as, sum_over_shards
from hf_compress.member import Member
from hf_compress.quantization.given import check_given, this_ranks
from hf_compress.quantization.grids import (
    Grid,
    GroupSize,
    fake_quantize,
    fake_quantize_,
    grouped,
    scale_shape,
    stop_clipped_,
)
from hf_compress.quantization.learned import learn_scale_, scale_gradient
from hf_compress.quantization.requirements import check_weight
from hf_compress.quantization.schemes import Scheme, fit
from hf_compress.schedules import Schedule, check_interval
from hf_compress.targets import Target

INTERVAL = 50
# How far a step of its scale moves the value of the highest code, in steps of the grid. At 2 bits that
# is the relative change, and a scale can double within some hundred steps, as these need it: at a fifth
# of this they stayed near their first fit, and at twice this they swayed under a large learning rate.
# With more bits the same relative change would move a weight of many steps by more than rounding does.
SCALE_RATE = 1e-2


class Quantizer(TimedConstraint):
    """Training on integer grids (arXiv:1712.05877), to be attached by `constrain`.

    bits: 2 to 8; or several, falling, such as (8, 6, 4): the first from `start` on, the last from `end`
        on, and the others for equal times between.
    group_size, symmetric, grid: see `hf_compress.quantization.schemes.Scheme`.
    start, end: optimizer steps (int) or fractions of the training (float in [0, 1]). Before `start` the
        weights are free. From `end` on the grid is fixed, and the weights settle on it.
    interval: optimizer steps between two fits of the grid to the latent weights; by default each step
        for "absmax" and "minmax", and for the others 50, less where the time is so short that there
        would be fewer than ten fits. The first weights on the grid, new bits and `end` are fitted too.
    learn_scale: whether the scales are trained too, from their first fit on until `end`, by steps that
        move the highest code by about 1 % of a step of the grid and shrink towards `end`: see
        `hf_compress.quantization.learned`. Only new bits are fitted again then.
    grids: by the name of the weight the grid to begin with, as `quantize_oneshot_` returns them: with
        the first of `bits` the weights lie on these, which are not fitted again (scales may be learnt).
        Without them they are fitted, as `grid` says.
    targets: where the input dimension of each weight lies, as `find_targets` tells.

    From `start` on, the model and every checkpoint hold weights of the grid only; zero always belongs
    to it. The gradient of a weight that the grid clips is masked; all others pass straight through.
    The grid is fitted to what masks have left, and the result does not depend on which constraint was
    attached first.

    Save the optimizer of FSDP2 shards sharded, which is Accelerate's default there: of a full state
    dict torch shards only what the optimizer that it is loaded into has already.

    Memory for each weight: a latent copy; for each group a scale, unless symmetric a zero point, and of
    a learned scale two moments.

    Tell it the time before it is attached and before each step: `quantizer.at(step, max_steps)`, with
    the number of optimizer steps taken when this one is done.

    Raises ValueError for settings out of range, and when attached for weights that are not finite, that
    `group_size` does not divide, whose groups FSDP2 shards cut, whose dtype is too coarse to learn a
    scale in, that were not loaded on resuming, or whose checkpoint holds another kind of grid; and for
    `grids` of other weights, bits, groups, symmetry or dtype.
    """

    order = 1
    needs_latent = True

    def __init__(
        self,
        bits: int | Sequence[int],
        *,
        group_size: GroupSize = None,
        symmetric: bool = True,
        grid: str = "mse",
        start: int | float = 0.0,
        end: int | float = 0.6,
        interval: int | None = None,
        learn_scale: bool = False,
        grids: Mapping[str, Grid] | None = None,
        targets: Mapping[str, Target] | None = None,
    ) -> None:
        self.bits = tuple(bits) if isinstance(bits, Sequence) else (bits,)
        if not self.bits or any(a <= b for a, b in zip(self.bits, self.bits[1:], strict=False)):
            raise ValueError(f"`bits` is {bits!r}: pass one width, or several that fall, as (8, 6, 4).")
        for width in self.bits:
            self.scheme = Scheme(bits=width, group_size=group_size, symmetric=symmetric, grid=grid)
        if interval is not None:
            check_interval(interval)
        self.schedule = Schedule(final=len(self.bits) - 1, shape="linear", start=start, end=end)
        self.interval = interval
        self.learn_scale = learn_scale
        if grids is not None and not grids:
            raise ValueError(
                "`grids` is empty: pass what `quantize_oneshot_` returns, or leave it out."
            )
        self._given = dict(grids or {})
        self._targets = targets or {}
        self._grids: dict[str, Grid] = {}
        self._bits: int | None = None
        self._due = True
        self._finished = False

    @property
    def begun(self) -> bool:
        start, _ = self.schedule.span(self._max_steps)
        return self._step > start

    @property
    def width(self) -> int | None:
        """The bits of the weights now; None while they are free."""
        return self._bits

    @property
    def finished(self) -> bool:
        """Whether the weights lie on their last grid."""
        return self._finished

    @property
    def grids(self) -> dict[str, Grid]:
        """The grids that the weights lie on now, by name; of sharded weights this rank's part."""
        return dict(self._grids)

    def check(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Raises ValueError where one of `parameters` (by name) cannot be put on a grid."""
        for name, param in parameters.items():
            if name not in self._targets:
                raise ValueError(
                    f"the input dimension of {name} must be known: pass "
                    "`targets=find_targets(model).targets`."
                )
            check_weight(
                name,
                param,
                input_dim=self._targets[name].input_dim,
                group_size=self.scheme.group_size,
                learn_scale=self.learn_scale,
            )
        if self._given:
            first = replace(self.scheme, bits=self.bits[0])
            check_given(self._given, parameters, self._targets, first)

    def begin(self, members: Sequence[Member]) -> None:
        self._check_time()
        start, end = self.schedule.span(self._max_steps)
        self.check({member.name: member.param for member in members})
        # Weights without a gradient have no state in a checkpoint.
        restored = [member for member in members if "scale" in member]
        if restored:
            # Not from the schedule: the step of new bits may have been skipped by an fp16 overflow.
            self._bits = int(restored[0]["bits"].item())
            for member in restored:
                self._grids[member.name] = self._restored(member)
                self._check_on_grid(member)
        elif self._step >= start:
            self._bits = self._scheduled()
        self._due = not restored
        self._finished = not self._due and self._step >= end and self._bits == self.bits[-1]

    def observe(self, members: Sequence[Member]) -> None:
        if self._bits is not None:
            for member in members:
                grad = self._groups(member, cast(Tensor, member.param.grad))
                latent, grid = self._groups(member, member.latent), self._grids[member.name]
                if self.learn_scale and not self._finished:
                    moments = local(member["scale_mean"]), local(member["scale_square"])
                    learn_scale_(grid.scale, scale_gradient(latent, grad, grid), *moments, self._rate())
                stop_clipped_(grad, latent, grid)

    def update(self, members: Sequence[Member]) -> None:
        self._check_time()
        start, end = self.schedule.span(self._max_steps)
        if self._step >= start:
            bits = self._scheduled()
            again = self._step >= end or self._fits(self._step - start)
            rests = self.learn_scale or self._is_given(bits)
            self._due = bits != self._bits or again and not self._finished and not rests
            self._bits, self._finished = bits, self._step >= end

    def project_(self, members: Sequence[Member]) -> None:
        # Here and not in `update`, since masks have been applied by now.
        if self._bits is None:
            return
        for member in members:
            weight = self._groups(member, member.param)
            if self._due or member.name not in self._grids:
                self._keep(member, self._found(member, weight, self._bits))
            fake_quantize_(weight, self._grids[member.name])

    def _found(self, member: Member, weight: Tensor, bits: int) -> Grid:
        if self._is_given(bits):
            return this_ranks(member.param, self._given[member.name])
        return fit(weight, replace(self.scheme, bits=bits))

    def _is_given(self, bits: int | None) -> bool:
        """Whether the grids of so many bits were given."""
        return bool(self._given) and bits == self.bits[0]

    def _scheduled(self) -> int:
        return self.bits[int(self.schedule.value(self._step, self._max_steps))]

    def _fits(self, steps: int) -> bool:
        """Whether a fit is due so many steps after the start."""
        start, end = self.schedule.span(self._max_steps)
        searched = min(INTERVAL, max((end - start) // 10, 1)) if self.scheme.searched else 1
        return steps % (self.interval or searched) == 0

    def _rate(self) -> float:
        """Of the coming step of the scales: zero at `end`, so that the grid is at rest when fixed."""
        start, end = self.schedule.span(self._max_steps)
        highest = 2 ** (cast(int, self._bits) - 1) - 1
        return SCALE_RATE / highest * max(end - self._step, 0) / max(end - start, 1)

    def _groups(self, member: Member, tensor: Tensor) -> Tensor:
        """This rank's part of `tensor`, which lies as the weight does, as (*groups, members)."""
        dim = self._targets[member.name].input_dim
        return grouped(local(tensor), input_dim=dim, group_size=self.scheme.group_size)

    def _shape(self, member: Member) -> torch.Size:
        """Of the scales of the whole weight."""
        dim = self._targets[member.name].input_dim
        return scale_shape(member.param, input_dim=dim, group_size=self.scheme.group_size)

    def _restored(self, member: Member) -> Grid:
        kept = {"scale", "bits"}
        kept |= set() if self.scheme.symmetric else {"zero_point"}
        kept |= {"scale_mean", "scale_square"} if self.learn_scale else set()
        if member["scale"].shape != self._shape(member) or not kept <= member.keys():
            raise ValueError(
                f"the checkpoint holds another kind of grid for {member.name}: resume with the "
                "`group_size`, `symmetric` and `learn_scale` that it was trained with."
            )
        if ("given" in member) is not self._is_given(self._bits):
            began = "was given" if "given" in member else "was not given"
            raise ValueError(
                f"the grid that the checkpoint holds for {member.name} {began} by `grids`: resume "
                f"with{'' if 'given' in member else 'out'} them."
            )
        return Grid(
            scale=local(member["scale"]),
            zero_point=None if self.scheme.symmetric else local(member["zero_point"]),
            bits=cast(int, self._bits),
        )

    def _keep(self, member: Member, grid: Grid) -> None:
        self._grids[member.name] = grid
        shape = self._shape(member)
        member["scale"] = placed_as(member.param, grid.scale, shape)
        if grid.zero_point is not None:
            member["zero_point"] = placed_as(member.param, grid.zero_point, shape)
        if self.learn_scale:
            for moment in ("scale_mean", "scale_square"):
                member[moment] = placed_as(member.param, torch.zeros_like(grid.scale), shape)
        # Of the weight's dtype, as all that lives in the optimizer's state.
        member["bits"] = grid.scale.new_tensor(grid.bits)
        if self._is_given(grid.bits):
            member["given"] = grid.scale.new_ones(())
        elif "given" in member:
            del member["given"]

    def _check_on_grid(self, member: Member) -> None:
        weight = self._groups(member, member.param)
        astray = fake_quantize(weight, self._grids[member.name]) != weight
        count = int(sum_over_shards([(astray.sum(), member.param)]))
        check_loaded(member.name, count, "on the grid that the checkpoint's optimizer tells")
