"""Which weights of a group stay: who competes with whom, and selection over weights and blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from hf_compress.distributed import local, placed_as
from hf_compress.pruning.patterns import Pattern, block_sums, keep_n_of_m, spread
from hf_compress.pruning.select import Inputs, check_finite, keep_highest, scores_of, total
from hf_compress.targets import Target

PIECE = 1 << 20

Scope = Literal["global", "layer", "row"]
Formula = Callable[..., Tensor]


@dataclass(frozen=True, kw_only=True)
class Contest:
    """Weights that are ranked together, pruned in portions of `volume`: a weight, a block, or one
    block of each group within the rows (then `group` is the number of blocks in a group)."""

    weights: dict[str, Tensor]
    blocks: list[tuple[int, ...]]
    size: int
    volume: int
    group: int | None = None
    input_dim: int = -1

    def due(self, sparsity: float, *, final: float, floor: int) -> int:
        """Weights to prune: the nearest number of portions, and at `final` the fewest that reach it;
        never fewer than `floor`."""
        needed = floor
        if sparsity == final:
            needed = max(floor, round(final * self.size))
        portions = -(-needed // self.volume)
        if sparsity != final:
            portions = max(portions, round(sparsity * self.size / self.volume))
        return portions * self.volume

    def rank(
        self, formula: Formula, inputs: Sequence[Inputs], pruned: int, *, at_least: float
    ) -> list[Tensor]:
        """Masks that keep all but `pruned` weights, a multiple of `volume`; see `keep_highest`."""
        kept, weights = (self.size - pruned) // self.volume, list(self.weights.values())
        if self.group is not None:
            mask = keep_within_rows(
                formula,
                inputs[0],
                block=self.blocks[0],
                kept=kept,
                group=self.group,
                input_dim=self.input_dim,
            )
            return [_as_mask(mask, weights[0])]
        if self.volume == 1:
            return keep_highest(formula, inputs, kept, at_least=at_least)
        sums = [
            placed_as(
                weight,
                block_sums(scores_of(formula, tensors), block),
                [n // size for n, size in zip(weight.shape, block, strict=True)],
            )
            for tensors, weight, block in zip(inputs, weights, self.blocks, strict=True)
        ]
        masks = keep_highest(lambda score: score, [(s,) for s in sums], kept, at_least=at_least)
        return [
            _as_mask(spread(local(mask), block), weight)
            for mask, weight, block in zip(masks, weights, self.blocks, strict=True)
        ]


def contests(
    weights: Mapping[str, Tensor],
    pattern: Pattern,
    scope: Scope,
    targets: Mapping[str, Target] | None,
) -> list[Contest]:
    """Who competes with whom among `weights`.

    scope: "global", all whose blocks are equally large; "layer", each weight alone; "row", each row of
        blocks alone. Groups of an N:M pattern compete alone in any scope.
    targets: tell the input dimension; needed but for single weights in scope "global" or "layer".
    Raises ValueError for weights that the pattern does not divide, or whose shards cut what belongs
    together.
    """
    plain = pattern.elementwise and pattern.group is None and scope != "row"
    blocks, found = {}, []
    for name, weight in weights.items():
        blocks[name] = (1,) * weight.dim()
        if plain:
            continue
        if targets is None or name not in targets:
            raise ValueError(
                f"with pattern {pattern.name!r} and scope {scope!r} the input dimension of {name} must "
                "be known: pass `targets=find_targets(model).targets`."
            )
        dim = targets[name].input_dim
        pattern.check(name, weight.shape, dim)
        blocks[name] = pattern.block(weight.shape, dim)
        group = pattern.group
        if scope == "row" and group is None:
            group = weight.shape[dim] // blocks[name][dim]
        extent = list(blocks[name])
        extent[dim] *= group or 1
        # Summed over the ranks, so that all of them refuse.
        if total(len(local(weight)) % extent[0], weight) > 0:
            raise ValueError(
                f"the shards of {name} {tuple(weight.shape)} cut what belongs together in pattern "
                f"{pattern.name!r} with scope {scope!r}: change the number of ranks, use DDP, or leave "
                "it out by `ignore`."
            )
        if group is not None:
            volume = weight.numel() // group
            found.append(_contest({name: weight}, blocks, volume, group=group, input_dim=dim))
    if found:
        return found
    if scope == "layer":
        return [_contest({n: w}, blocks, math.prod(blocks[n])) for n, w in weights.items()]
    by_volume: dict[int, dict[str, Tensor]] = {}
    for name, weight in weights.items():
        by_volume.setdefault(math.prod(blocks[name]), {})[name] = weight
    return [_contest(group, blocks, volume) for volume, group in by_volume.items()]


def check_scope(scope: str, pattern: Pattern) -> None:
    """Raises ValueError for an unknown scope and for one that leaves nothing to choose."""
    if scope not in get_args(Scope):
        raise ValueError(f"`scope` is {scope!r}; allowed are {list(get_args(Scope))}.")
    if scope == "row" and pattern.columns is None:
        raise ValueError("within one row, pattern 'row' has nothing to rank: use another `scope`.")


def keep_within_rows(
    formula: Formula,
    tensors: Inputs,
    *,
    block: tuple[int, ...],
    kept: int,
    group: int,
    input_dim: int,
) -> Tensor:
    """Mask that keeps the `kept` best of each `group` neighbouring blocks along the input dimension.

    Sharded weights give the mask of this rank's part. Raises ValueError for scores that are not finite.
    """
    score = block_sums(scores_of(formula, tensors), block).movedim(input_dim, -1)
    bad = int(score.isfinite().logical_not_().sum())
    check_finite(total(bad, tensors[0]) if isinstance(tensors[0], Tensor) else bad)
    rows = score.reshape(-1, group)
    mask = torch.empty_like(rows, dtype=torch.bool)
    # In pieces, since sorting takes an index of eight bytes for each score.
    step = max(PIECE // group, 1)
    for start in range(0, len(rows), step):
        mask[start : start + step] = keep_n_of_m(rows[start : start + step], kept, group)
    return spread(mask.view(score.shape).movedim(-1, input_dim), block)


def _contest(
    weights: dict[str, Tensor],
    blocks: Mapping[str, tuple[int, ...]],
    volume: int,
    *,
    group: int | None = None,
    input_dim: int = -1,
) -> Contest:
    return Contest(
        weights=weights,
        blocks=[blocks[name] for name in weights],
        size=sum(weight.numel() for weight in weights.values()),
        volume=volume,
        group=group,
        input_dim=input_dim,
    )


def _as_mask(part: Tensor, weight: Tensor) -> Tensor:
    mask = torch.zeros_like(weight, dtype=torch.bool)
    local(mask).copy_(part)
    return mask
