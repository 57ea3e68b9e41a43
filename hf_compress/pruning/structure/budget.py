"""Structure removed down to a budget in units of the user: time on this machine, or bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from hf_compress.calibration.batches import Batch, check_calibration
from hf_compress.frozen import evaluating
from hf_compress.latency import compare_latency
from hf_compress.pruning.structure.architectures import Kind
from hf_compress.pruning.structure.choice import check_round_to
from hf_compress.pruning.structure.parts import (
    Part,
    find_parts,
    is_possible,
    kept_by,
    predicted_cost,
    settings_of,
    shares_by_stack,
)
from hf_compress.pruning.structure.removal import remove_units
from hf_compress.pruning.structure.scores import UnitScore, items_of, score_units
from hf_compress.pruning.structure.units import find_units

ATTEMPTS = 8


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """A smaller ordinary model, and what it is like beside the dense one.

    settings: what was removed, as `prune_structure` takes it.
    speedup: how many times faster, measured; None where bytes were asked for.
    bytes, losses: of the weights, and on the calibration: before and after.
    """

    model: PreTrainedModel
    settings: dict[str, Any]
    speedup: float | None
    bytes: tuple[int, int]
    losses: tuple[float, float]


def fit_structure(
    model: PreTrainedModel,
    calibration: Iterable[Batch],
    *,
    speedup: float | None = None,
    max_bytes: int | None = None,
    inputs: Mapping[str, Tensor] | None = None,
    kinds: Sequence[Kind] | None = None,
    score: UnitScore = "taylor",
    round_to: int = 1,
    runs: int = 20,
    seed: int = 0,
) -> Fitted:
    """A smaller ordinary model, fast or small enough, for as little loss as it can be had.

    calibration: batches with labels as the model's forward takes them, which decide what goes.
    speedup: how many times faster the result is to be, above 1, in the median of `runs` forward passes
        of `inputs` in turn with the dense model, on this machine as it is now.
    max_bytes: instead, the most that the weights may take (a file has a header of some KB beside).
    inputs: what one call looks like; by default the first batch of the calibration.
    kinds: of "ffn", "heads", "experts", "hidden", "layers" those that may go; by default all that can.
    score, round_to, seed: see `prune_structure`.

    Each kind is removed alone in up to 16 steps, which tells what each costs in loss and what the last
    one saves. The choice among all combinations takes both as sums; the result is measured, and
    chosen anew where it misses the budget. Losses are those before any recovery.

    Memory: two models. The given model is unchanged. Raises ValueError for a budget that is none or
    cannot be reached (with the nearest that can), and as `prune_structure` does.
    """
    limit = _check_budget(model, speedup, max_bytes)
    check_round_to(round_to)
    batches = check_calibration(calibration)
    called = batches[0] if inputs is None else inputs

    def cost(smaller: PreTrainedModel) -> float:
        """Of the dense model's."""
        if max_bytes is not None:
            return _bytes(smaller) / _bytes(model)
        times = compare_latency({"dense": model, "smaller": smaller}, called, runs=runs)
        return times["smaller"].median_ms / times["dense"].median_ms

    units = find_units(model, kinds)
    with evaluating(model):
        scores = score_units(model, units, score=score, calibration=batches, seed=seed)
        parts = find_parts(model, units, scores, round_to)
        dense_loss = _loss(model, batches)
        harms, shares = _alone(model, parts, batches, dense_loss, cost)
        smaller, chosen, found = _search(model, parts, harms, shares, limit, cost)
        loss = _loss(smaller, batches)
    return Fitted(
        model=smaller.train(model.training),
        settings=settings_of(parts, chosen, units),
        speedup=None if speedup is None else 1 / found,
        bytes=(_bytes(model), _bytes(smaller)),
        losses=(dense_loss, loss),
    )


def _check_budget(model: PreTrainedModel, speedup: float | None, max_bytes: int | None) -> float:
    """The part of the dense model's cost that may stay."""
    if (speedup is None) == (max_bytes is None):
        raise ValueError("give one budget: `speedup`, such as 2.0, or `max_bytes`, such as 60_000_000.")
    if speedup is not None:
        number = isinstance(speedup, int | float) and not isinstance(speedup, bool)
        if not number or not 1 < speedup < math.inf:
            raise ValueError(f"`speedup` is {speedup!r}: how many times faster, above 1, such as 1.5.")
        return 1 / speedup
    dense = _bytes(model)
    if isinstance(max_bytes, int) and 0 < max_bytes < dense:
        return max_bytes / dense
    raise ValueError(
        f"`max_bytes` is {max_bytes!r}: a whole number below the {dense:,} bytes of the weights."
    )


def _alone(
    model: PreTrainedModel,
    parts: Sequence[Part],
    batches: Sequence[Batch],
    dense_loss: float,
    cost: Callable[[PreTrainedModel], float],
) -> tuple[list[dict[float, float]], list[float]]:
    """For each part the loss that each option adds, and the part of the cost that would go with it."""
    harms, shares = [], []
    with logging.tqdm(total=sum(len(part.options) for part in parts), desc="Removing") as bar:
        for part in parts:
            least = min(part.options)  # whose saving is the largest, hence measured best
            harm = {1.0: 0.0}
            for left, kept in part.options.items():
                smaller = remove_units(model, kept).eval()
                harm[left] = max(_loss(smaller, batches) - dense_loss, 0.0)
                if left == least:
                    shares.append(max((1 - cost(smaller)) / (1 - least), 0.0))
                bar.update()
            harms.append(harm)
    return harms, shares


def _search(
    model: PreTrainedModel,
    parts: Sequence[Part],
    harms: Sequence[Mapping[float, float]],
    shares: Sequence[float],
    limit: float,
    cost: Callable[[PreTrainedModel], float],
) -> tuple[PreTrainedModel, tuple[float, ...], float]:
    """The least harmful that is measured to cost no more than `limit`: model, what is left, cost."""
    stacks = {u.name: u for part in parts for u in part.units if part.stack}
    weights = [shares_by_stack(part, stacks.values()) for part in parts]
    choices = [
        (sum(harm[left] for harm, left in zip(harms, choice, strict=True)), -sum(choice), choice)
        for choice in product(*(part.left for part in parts))
    ]
    priced = [
        (choice, predicted_cost(parts, choice, shares, weights)) for *_, choice in sorted(choices)
    ]
    bound, least = limit, math.inf
    by_price = sorted(priced, key=lambda each: each[1])
    smallest, lowest = next(each for each in by_price if is_possible(model, parts, each[0]))
    for _ in range(ATTEMPTS):
        cheap = (choice for choice, price in priced if price <= bound)
        choice = next((choice for choice in cheap if is_possible(model, parts, choice)), smallest)
        smaller = remove_units(model, kept_by(parts, choice))
        found = cost(smaller.eval())
        if found <= limit:
            return smaller, choice, found
        least = min(least, found)
        if choice == smallest:
            break
        # What was too dear by a tenth: a tenth less of what it was predicted to cost, next time.
        bound = max(predicted_cost(parts, choice, shares, weights) * limit / found, lowest)
    raise ValueError(
        f"the budget is {limit:.3f} of what the dense model takes, and the nearest that was found "
        f"takes {least:.3f}: ask for less, allow more `kinds`, or quantize too."
    )


@torch.no_grad()
def _loss(model: PreTrainedModel, batches: Sequence[Batch]) -> float:
    total, items = 0.0, 0
    for batch in batches:
        moved = {key: value.to(model.device) for key, value in batch.items()}
        loss = model(**moved).loss
        if loss is None:
            raise ValueError("a budget weighs losses: the calibration batches must carry labels.")
        count = items_of(model, batch)
        if count:
            total, items = total + loss.item() * count, items + count
    return total / max(items, 1)


def _bytes(model: nn.Module) -> int:
    return sum(param.numel() * param.element_size() for param in model.parameters())
