"""Exact selection: keep exactly the k highest scores over any number of tensors.

Floats sort like their bit patterns, so two histograms of 65,536 bins (of the upper, then the lower
16 bits) find the exact threshold in time linear in the weights. Scores are computed in pieces, three
times; nothing is concatenated and nothing of a weight's size is kept but the masks.

Weights that would keep less than their floor get it first, and the others share the rest. Most of them
are known after the first histogram, by a coarse one of 4,096 bins that is kept for each weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import cast

import torch
from torch import Tensor

from hf_compress.distributed import count_in_earlier_shards, local, sum_over_shards
from hf_compress.pruning.scores import Noise

PIECE = 1 << 18
BINS = 1 << 16
COARSE = 1 << 12
# Upper halves of -inf and inf, in `_keys` order: finite scores lie strictly between.
LOWEST, HIGHEST = 0x007F, 0xFF80

Inputs = tuple[Tensor | Noise, ...]
"""What the score of a weight is computed from: a tensor first, noise in pieces as it is needed."""


def keep_highest(
    formula: Callable[..., Tensor],
    inputs: Sequence[Inputs],
    kept: int,
    *,
    at_least: float = 0.0,
) -> list[Tensor]:
    """Masks that keep exactly `kept` weights: those of the highest `formula(*inputs[i])`.

    inputs: for each weight the tensors of its score, all of one shape and placement; whole or
        sharded along their first dimension (then every rank calls this and gets its part).
    at_least: the fraction in [0, 1] of each weight that is kept in any case, so that no layer
        collapses; lowered to `kept` over the total where it is more.
    Returns a bool mask for each weight, of its shape and placement. Equal scores are pruned in the
    order of the weights and, within one, of its memory: the same on any number of ranks.
    Raises ValueError for scores that are not finite and for a `kept` that is out of range.
    """
    sizes = [_first(tensors).numel() for tensors in inputs]
    if not 0 <= kept <= sum(sizes):
        raise ValueError(f"cannot keep {kept} of {sum(sizes)} weights.")
    at_least = min(at_least, kept / max(sum(sizes), 1))
    floors = [int(at_least * size) for size in sizes]
    upper = torch.zeros(BINS, dtype=torch.int64)
    coarse = torch.empty(len(inputs), COARSE, dtype=torch.int64)
    for i, tensors in enumerate(inputs):
        counts = _upper_histogram(formula, tensors)
        upper += counts
        coarse[i] = counts.view(COARSE, -1).sum(1)
    check_finite(int(upper[: LOWEST + 1].sum() + upper[HIGHEST:].sum()))

    masks: dict[int, Tensor] = {}
    free = list(range(len(inputs)))
    starved = _surely_starved(coarse, kept, floors)
    while free:
        for i in starved:
            counts = _upper_histogram(formula, inputs[i])
            (masks[i],) = _keep_highest(formula, [inputs[i]], floors[i], counts)
            upper -= counts
            kept -= floors[i]
            free.remove(i)
        chosen = _keep_highest(formula, [inputs[i] for i in free], kept, upper)
        masks.update(zip(free, chosen, strict=True))
        starved = [i for i in free if count_kept(masks[i]) < floors[i]]
        if not starved:
            break
    return [masks[i] for i in range(len(inputs))]


def count_kept(mask: Tensor) -> int:
    """Number of weights that `mask` keeps, over all ranks."""
    # `sum` would make an int64 copy of the mask first.
    return total(int(torch.count_nonzero(local(mask))), mask)


def scores_of(formula: Callable[..., Tensor], tensors: Inputs) -> Tensor:
    """The fp32 scores of this rank's part of one weight, in its shape."""
    part = local(_first(tensors))
    scores = torch.empty(part.numel(), device=part.device)
    for place, piece in _pieces(formula, tensors):
        scores[place] = piece
    return scores.view(part.shape)


def check_finite(bad: int) -> None:
    """Raises ValueError where there are `bad` scores that are NaN or infinite."""
    if bad > 0:
        raise ValueError(
            f"{bad} scores are NaN or infinite: the training diverged before they were ranked. "
            "Lower the learning rate, or start pruning later."
        )


def total(count: int, tensor: Tensor) -> int:
    """Sum of `count` over the ranks that hold parts of `tensor`."""
    return int(sum_over_shards([(torch.tensor([count], device=local(tensor).device), tensor)]))


def _upper_histogram(formula: Callable[..., Tensor], tensors: Inputs) -> Tensor:
    """Counts (BINS,) of the upper halves of one weight's scores, over all ranks, on the CPU."""
    return _histogram(formula, [tensors], lambda keys: (keys >> 16) + BINS // 2)


def _surely_starved(coarse: Tensor, kept: int, floors: Sequence[int]) -> list[int]:
    """Weights that keep less than their floor, as far as their histograms (weights, COARSE) tell: none
    keeps more than it has from the bin of the lowest kept score on."""
    at_or_above = coarse.flip(1).cumsum(1).flip(1)
    least = torch.tensor(floors)
    free = torch.ones(len(floors), dtype=torch.bool)
    while True:
        reached = (at_or_above[free].sum(0) >= kept).nonzero()
        starved = free & (at_or_above[:, int(reached.max())] < least)
        if not starved.any():
            return (~free).nonzero().squeeze(1).tolist()
        free &= ~starved
        kept -= int(least[starved].sum())


def _keep_highest(
    formula: Callable[..., Tensor], inputs: Sequence[Inputs], kept: int, upper: Tensor
) -> list[Tensor]:
    """As `keep_highest`, without floors; `upper` is the sum of the inputs' `_upper_histogram`."""
    pruned = sum(_first(tensors).numel() for tensors in inputs) - kept
    if pruned == 0:
        return [torch.ones_like(_first(tensors), dtype=torch.bool) for tensors in inputs]
    bin_, rest = _find(upper, pruned)
    half = bin_ - BINS // 2
    lower = _histogram(formula, inputs, lambda keys: keys[(keys >> 16) == half] & 0xFFFF)
    low, pruned_ties = _find(lower, rest)
    threshold = (half << 16) + low
    return _masks(formula, inputs, threshold, pruned_ties, int(lower[low]))


def _masks(
    formula: Callable[..., Tensor],
    inputs: Sequence[Inputs],
    threshold: int,
    pruned_ties: int,
    all_ties: int,
) -> list[Tensor]:
    some_stay = pruned_ties < all_ties
    # All at once: among the pieces below, each would leave a hole in the heap.
    masks = [torch.zeros_like(_first(tensors), dtype=torch.bool) for tensors in inputs]
    for mask, tensors in zip(masks, inputs, strict=True):
        flat = local(mask).view(-1)
        ties = [torch.empty(0, dtype=torch.int64, device=flat.device)]
        for place, keys in _keys(formula, tensors):
            torch.gt(keys, threshold, out=flat[place])
            if some_stay:
                ties.append((keys == threshold).nonzero().squeeze(1) + place.start)
        if some_stay:
            tied = torch.cat(ties)
            before = count_in_earlier_shards(len(tied), mask)
            flat[tied[max(pruned_ties - before, 0) :]] = True
            pruned_ties -= min(total(len(tied), mask), pruned_ties)
    return masks


def _histogram(
    formula: Callable[..., Tensor],
    inputs: Sequence[Inputs],
    bins: Callable[[Tensor], Tensor],
) -> Tensor:
    def one(tensors: Inputs) -> Tensor:
        counts = torch.zeros(BINS, dtype=torch.int64, device=local(_first(tensors)).device)
        for _, keys in _keys(formula, tensors):
            counts += torch.bincount(bins(keys), minlength=BINS)
        return counts

    return sum_over_shards((one(tensors), _first(tensors)) for tensors in inputs).cpu()


def _keys(formula: Callable[..., Tensor], tensors: Inputs) -> Iterator[tuple[slice, Tensor]]:
    """int32 keys that sort as the fp32 scores do; -0 and 0 share one."""
    for place, score in _pieces(formula, tensors):
        # A copy too: a formula may give the statistic itself.
        bits = (score + 0.0).view(torch.int32)
        yield place, bits.bitwise_xor_((bits >> 31).bitwise_and_(0x7FFFFFFF))


def _pieces(formula: Callable[..., Tensor], tensors: Inputs) -> Iterator[tuple[slice, Tensor]]:
    flat = [local(t).reshape(-1) if isinstance(t, Tensor) else t for t in tensors]
    size = local(_first(tensors)).numel()
    for start in range(0, size, PIECE):
        place = slice(start, min(start + PIECE, size))
        yield place, formula(*(part[place].float() for part in flat))


def _find(counts: Tensor, rank: int) -> tuple[int, int]:
    """The bin of the `rank`-th lowest entry (from 1), and its rank within the bin."""
    running = counts.cumsum(0)
    bin_ = int(torch.searchsorted(running, rank))
    return bin_, rank - int(running[bin_] - counts[bin_])


def _first(tensors: Inputs) -> Tensor:
    return cast(Tensor, tensors[0])
