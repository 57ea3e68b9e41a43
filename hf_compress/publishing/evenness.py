"""On how fine a grid given numbers lie, told from the numbers alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_WIDEST = 8  # bits
_SAMPLE = 1024  # groups


@torch.no_grad()
def fewest_bits(groups: Tensor) -> int | None:
    """The fewest bits, 0 to 8, of which every group lies on an evenly spaced grid that holds zero; None
    where a group lies on none.

    groups: (..., members), each group with a spacing of its own. Neither the spacing nor the zero point
    is known: this is what a stranger can see of a model whose integers are stored as floats. Numbers
    may be off the grid by the rounding of their dtype; bfloat16 itself rounds to 8 bits, and is always
    on such a grid.
    """
    eps = torch.finfo(groups.dtype).eps
    values = groups.reshape(-1, groups.shape[-1]).double()
    lowest = values.amin(-1, keepdim=True).clamp(max=0)
    span = values.amax(-1, keepdim=True).clamp(min=0) - lowest
    steps = 0  # of the widest group
    left = (span > 0).squeeze(-1)
    values, lowest, span = values[left], lowest[left], span[left]
    # The spacing divides the distance of two neighbours, and mostly is it.
    ordered = torch.cat([values, torch.zeros_like(lowest)], dim=-1).sort(-1).values
    distances = ordered.diff(dim=-1)
    noise = eps * values.abs().amax(-1, keepdim=True)
    nearest = distances.where(distances > noise, math.inf).amin(-1, keepdim=True)
    for part in range(1, 2**_WIDEST):
        # In a coarse dtype two neighbours tell too little.
        if not len(values) or groups.dtype.itemsize < 4:
            break
        count = (part * span / nearest).round().clamp(min=1)
        even = (count < 2**_WIDEST).squeeze(-1) & _even(values, lowest, span / count, eps)
        if even.any():
            steps = max(steps, int(count[even].max()))
            values, lowest, span, nearest = (x[~even] for x in (values, lowest, span, nearest))
    if len(values):
        # Every count, of some groups: of many that lie on no such grid these are enough to say so.
        values, lowest, span = (x[:_SAMPLE] for x in (values, lowest, span))
        found = torch.zeros(len(values), dtype=torch.long)
        for number in range(2**_WIDEST - 1, 0, -1):
            found[_even(values, lowest, span / number, eps)] = number
        if (found == 0).any():
            return None
        steps = max(steps, int(found.max()))
    return math.ceil(math.log2(steps + 1))


def _even(values: Tensor, lowest: Tensor, spacing: Tensor, eps: float) -> Tensor:
    """Which groups lie on multiples of their `spacing` from `lowest` on, and zero with them."""
    allowed = 1e-6 + eps * values.abs().amax(-1, keepdim=True) / spacing
    places = torch.cat([values - lowest, -lowest], dim=-1) / spacing
    return ((places - places.round()).abs() <= allowed).all(-1)
