"""Whether loss and gradient depend on how a batch is cut: measured on a few rows."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_compress.frozen import evaluating

Batch = Mapping[str, Any]


@dataclass(frozen=True)
class Cut:
    """The same rows in `accumulation` batches of at most `batch_size`, and what came of them."""

    batch_size: int
    accumulation: int
    loss: float
    gradient_norm: float


@dataclass(frozen=True)
class Scaling:
    """Several cuts of the same rows, the whole first. `str()` is a table.

    difference: the largest relative one of loss or gradient norm to those of the whole;
    agrees: whether that is within `tolerance`.
    """

    cuts: tuple[Cut, ...]
    tolerance: float

    @property
    def difference(self) -> float:
        whole = self.cuts[0]
        pairs = [
            pair
            for cut in self.cuts
            for pair in ((cut.loss, whole.loss), (cut.gradient_norm, whole.gradient_norm))
        ]
        return max(abs(value - expected) / max(abs(expected), 1e-12) for value, expected in pairs)

    @property
    def agrees(self) -> bool:
        return self.difference <= self.tolerance

    def __str__(self) -> str:
        whole = self.cuts[0]
        lines = ["batch x accumulation         loss   gradient norm   ratio of norms"]
        for cut in self.cuts:
            ratio = cut.gradient_norm / max(whole.gradient_norm, 1e-12)
            name = f"{cut.batch_size} x {cut.accumulation}"
            lines.append(f"{name:>20} {cut.loss:>12.6g} {cut.gradient_norm:>15.6g} {ratio:>16.6f}")
        verdict = "agree" if self.agrees else "DISAGREE"
        lines.append(
            f"The cuts {verdict}: they differ by at most {self.difference:.1e} of the values of the "
            f"whole batch, where {self.tolerance:.0e} is rounding."
        )
        return "\n".join(lines)


def measure_scaling(
    model: nn.Module,
    rows: Sequence[Any],
    collate: Callable[[Sequence[Any]], Batch],
    losses: Callable[[Sequence[Batch]], Iterable[Tensor]],
    *,
    tolerance: float,
) -> Scaling:
    """`rows` whole, in halves, quarters and so on down to single rows.

    losses: batches of one optimizer step -> the loss of each, whose gradients add up to that of the
    step. A collator that draws at random (masked language models) is asked once, and its batch sliced.
    Dropout is off; gradients, random states and modes of `model` are afterwards as they were.
    """
    cuts = []
    with _untouched(model):
        whole = collate(rows)
        drawn = not _equal(whole, collate(rows)) and _has_rows(whole, len(rows))
        for size in _sizes(len(rows)):
            parts = [slice(start, start + size) for start in range(0, len(rows), size)]
            batches = [
                {name: value[part] for name, value in whole.items()} if drawn else collate(rows[part])
                for part in parts
            ]
            loss = 0.0
            model.zero_grad(set_to_none=True)
            for part_of_loss in losses(batches):
                part_of_loss.backward()
                loss += part_of_loss.item()
            cuts.append(Cut(size, len(parts), loss, _gradient_norm(model)))
    return Scaling(tuple(cuts), tolerance)


def _sizes(rows: int) -> Iterator[int]:
    while rows:
        yield rows
        rows //= 2


def _gradient_norm(model: nn.Module) -> float:
    gradients = [param.grad for param in model.parameters() if param.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    # Of shards there is a norm on each process.
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def _equal(one: Batch, other: Batch) -> bool:
    return all(
        torch.equal(value, other[name]) for name, value in one.items() if isinstance(value, Tensor)
    )


def _has_rows(batch: Batch, rows: int) -> bool:
    # Packed rows are one long one.
    return all(isinstance(value, Tensor) and len(value) == rows for value in batch.values())


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    gradients = [(param, param.grad) for param in model.parameters()]
    states = random.getstate(), np.random.get_state()
    try:
        with evaluating(model), torch.random.fork_rng(), torch.enable_grad():
            yield
    finally:
        for param, gradient in gradients:
            param.grad = gradient
        random.setstate(states[0])
        np.random.set_state(states[1])


def tolerance_of(model: nn.Module, *, half: bool) -> float:
    """The relative difference that rounding may make: 1e-4 in fp32, 5e-2 in `half` precision, or where
    some of the weights are in it."""
    precise = all(param.dtype in (torch.float32, torch.float64) for param in model.parameters())
    return 1e-4 if precise and not half else 5e-2
