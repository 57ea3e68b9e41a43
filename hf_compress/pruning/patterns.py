"""Patterns: which weights are kept or pruned together, and among which they compete."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Up to here comparing each with each is faster than sorting.
SMALL = 8

Shape = Sequence[int]


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """How the zeros of a weight lie. Made by `Pattern.parse`.

    rows, columns: output and input features of a block, whose weights live and die together, with
        the sum of their scores; `columns` is None for all input features.
    kept, group: of each `group` neighbours along the input dimension `kept` stay at the end; None
        where blocks compete more widely.
    """

    name: str
    rows: int = 1
    columns: int | None = 1
    kept: int | None = None
    group: int | None = None

    @classmethod
    def parse(cls, name: str) -> Pattern:
        """The pattern of "unstructured", "row" (output features), "N:M" as "2:4" (at most N of M
        neighbours stay), or "RxC" as "4x1" (blocks of R output and C input features).

        Raises ValueError for anything else, and for sizes that make no sense.
        """
        if name == "unstructured":
            return cls(name=name)
        if name == "row":
            return cls(name=name, columns=None)
        sizes = re.fullmatch(r"([1-9]\d*)([:x])([1-9]\d*)", name) if isinstance(name, str) else None
        if sizes is None:
            raise ValueError(
                f"`pattern` is {name!r}; allowed are 'unstructured', 'row', N:M such as '2:4', and "
                "blocks of output x input features such as '4x1'."
            )
        first, second = int(sizes[1]), int(sizes[3])
        if sizes[2] == "x":
            return cls(name=name, rows=first, columns=second)
        if first >= second:
            raise ValueError(
                f"`pattern` {name!r} keeps {first} of {second} weights: it prunes nothing. Keep "
                "fewer, such as '2:4'."
            )
        return cls(name=name, kept=first, group=second)

    @property
    def elementwise(self) -> bool:
        """Whether each weight stands for itself."""
        return self.rows == self.columns == 1

    def block(self, shape: Shape, input_dim: int) -> tuple[int, ...]:
        """The size of a block along each axis of a weight of `shape`, (..., out, in) or (in, out)."""
        inputs, outputs = _axes(shape, input_dim)
        sizes = [1] * len(shape)
        sizes[inputs] = shape[inputs] if self.columns is None else self.columns
        sizes[outputs] = self.rows
        return tuple(sizes)

    def check(self, name: str, shape: Shape, input_dim: int) -> None:
        """Raises ValueError where a weight of `shape` cannot be divided."""
        inputs, _ = _axes(shape, input_dim)
        sizes = list(self.block(shape, input_dim))
        sizes[inputs] *= self.group or 1
        if any(length % size for length, size in zip(shape, sizes, strict=True)):
            raise ValueError(
                f"pattern {self.name!r} does not divide {name}, whose shape is {tuple(shape)} with "
                f"its input features along axis {inputs}: leave it out by `ignore`, or choose another "
                "pattern."
            )


def block_sums(score: Tensor, block: Shape) -> Tensor:
    """The sum of `score` over each block: (a, b, ...) -> (a / block[0], b / block[1], ...)."""
    split = [part for n, size in zip(score.shape, block, strict=True) for part in (n // size, size)]
    return score.reshape(split).sum(dim=tuple(range(1, 2 * score.dim(), 2)))


def spread(mask: Tensor, block: Shape) -> Tensor:
    """`mask` of blocks as a mask of their weights: the way back from `block_sums`."""
    for axis, size in enumerate(block):
        if size > 1:
            mask = mask.repeat_interleave(size, axis)
    return mask


def keep_n_of_m(score: Tensor, n: int, m: int) -> Tensor:
    """Bool mask that keeps the `n` highest of each `m` neighbours along the last dimension.

    score: (..., width), `width` a multiple of `m`. Of equal scores the earlier is kept.
    """
    groups = score.reshape(-1, m)
    return (_counted if m <= SMALL else _selected)(groups, n).reshape(score.shape)


def _counted(groups: Tensor, n: int) -> Tensor:
    """For few columns: a score stays when fewer than `n` others come before it."""
    columns = groups.unbind(1)
    kept = torch.empty_like(groups, dtype=torch.bool)
    for i, own in enumerate(columns):
        before = torch.zeros_like(own, dtype=torch.int8)
        for j, other in enumerate(columns):
            if j != i:
                before += other >= own if j < i else other > own
        torch.lt(before, n, out=kept[:, i])
    return kept


def _selected(groups: Tensor, n: int) -> Tensor:
    """For many columns: by the threshold of each row, and of what equals it the first."""
    if n == groups.shape[1]:
        return torch.ones_like(groups, dtype=torch.bool)
    threshold = groups.kthvalue(groups.shape[1] - n, dim=1, keepdim=True).values
    above, ties = groups > threshold, groups == threshold
    room = n - above.sum(1, keepdim=True)
    return above | ties & (ties.cumsum(1, dtype=torch.int32) <= room)


def _axes(shape: Shape, input_dim: int) -> tuple[int, int]:
    """The axes of the input and of the output features, which are the last two in some order."""
    inputs = input_dim % len(shape)
    return inputs, 2 * len(shape) - 3 - inputs
