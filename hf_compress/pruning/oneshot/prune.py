"""One-shot pruning: a trained model becomes sparse in minutes, from a little data and no gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn
from transformers.utils import logging

from hf_compress.calibration.batches import Batch, check_calibration
from hf_compress.calibration.casts import fresh_casts
from hf_compress.calibration.layer_inputs import Accumulate, Seen
from hf_compress.calibration.layerwise import layer_by_layer, matrices
from hf_compress.calibration.offloading import in_memory
from hf_compress.calibration.requirements import check_damping, check_experts, check_targets
from hf_compress.calibration.second_order import add_gram, inverse_factor
from hf_compress.pruning.masks import check_fractions, sparsity_of
from hf_compress.pruning.oneshot.sparsegpt import sparsegpt
from hf_compress.pruning.oneshot.wanda import add_squares, wanda_mask
from hf_compress.pruning.patterns import Pattern, keep_n_of_m
from hf_compress.pruning.scores import magnitude
from hf_compress.pruning.select import keep_highest
from hf_compress.targets import Selection, Target, find_targets, split_targets

OneShotScore = Literal["sparsegpt", "wanda", "magnitude"]


@dataclass(frozen=True)
class PrunedWeight:
    """size, zeros: entries, and those that are zero now.

    error: ||X (W' - W)^T||^2 / ||X W^T||^2, the share of the output's energy that is lost on the
        inputs X that were seen: measured by "sparsegpt"; "wanda" takes the features of X as
        uncorrelated, "magnitude" as all alike.
    positions: how many inputs were seen; of stacked experts the sum over the experts.
    """

    size: int
    zeros: int
    error: float
    positions: int


@dataclass(frozen=True)
class OneShotReport:
    """What was pruned, by name of the weight, and for each one left out the reason."""

    weights: Mapping[str, PrunedWeight]
    skipped: Mapping[str, str]

    @property
    def sparsity(self) -> float:
        """The fraction in [0, 1] of the pruned weights' entries that is zero."""
        sizes = sum(weight.size for weight in self.weights.values())
        return sum(weight.zeros for weight in self.weights.values()) / sizes


@dataclass(frozen=True)
class Method:
    """accumulate: the statistic that is summed over the inputs.
    prepare: what `prune` needs of the sum; made once for all matrices that share their inputs.
    prune(weight, prepared, sparsity): the new (out, in) of a matrix, fp32."""

    accumulate: Accumulate
    prepare: Callable[[Tensor], Tensor]
    prune: Callable[[Tensor, Tensor, float], Tensor]


@torch.no_grad()
@fresh_casts()
def prune_oneshot_(
    model: nn.Module,
    calibration: Iterable[Batch] | None = None,
    *,
    sparsity: float | Mapping[str, float] | None = None,
    score: OneShotScore = "sparsegpt",
    pattern: str = "unstructured",
    targets: str | Sequence[str] | None = None,
    ignore: str | Sequence[str] | None = None,
    block_size: int = 128,
    damping: float = 0.01,
) -> OneShotReport:
    """Prunes the weights of `model` in place, layer by layer, each after the ones before it.

    calibration: batches, mappings of tensors as the model's forward takes; some 32 to 128 rows of
        the text the model is meant for. How they are cut into batches does not matter. Not read by
        "magnitude".
    sparsity: fraction in [0, 1) of each targeted weight that becomes zero: by "wanda" the nearest part
        of each row, else exactly. Or one for each target, as a dict: `owl(...)`, or
        `{"down_proj": 0.5, "Linear": 0.7}`, where a weight that several match belongs to the first.
    score: "sparsegpt" (arXiv:2301.00774) also updates the weights it keeps and is the most accurate;
        "wanda" (arXiv:2306.11695) ranks |w| times the norm of its input within each output feature,
        in less time and memory; "magnitude" ranks |w| within each weight.
    pattern: "unstructured", or "N:M": of each M neighbours along the input features N are kept.
        `sparsity` is then 1 - N/M and may be left out.
    targets, ignore: see `hf_compress.targets.find_targets`. By default the Linear and Conv1D layers
        and experts of the backbone.
    block_size, damping: of "sparsegpt": columns among which entries compete, and what is added to
        the Hessian as a fraction of its mean diagonal.

    All batches go through the model once, in evaluation mode, each layer pruned as soon as all of
    them stand before it; the modes of the modules are restored. Memory: what the forwards hold
    there, as the inputs of one block; for "sparsegpt" also three (in, in) matrices of a layer.
    Weights that accelerate has offloaded are loaded when it is their turn; once pruned they stay in
    main memory. Experts to which no position is routed are ranked by magnitude.

    The zeros are kept by a later training with `PruningCallback` of the same sparsity.

    Raises ValueError before anything is changed for wrong settings, targets that match nothing,
    calibration that is missing, empty or NaN, weights that are sharded or whose inputs cannot be seen,
    and TypeError for calibration that is not made of tensors; on the way, with layers already pruned,
    ValueError where batches are not of one kind, or where inputs are NaN or infinite.
    """
    n_of_m, selection, fractions = _asked(model, sparsity, pattern, targets, ignore)
    by_magnitude = partial(prune_by_magnitude, n_of_m=n_of_m)
    check_targets(model, selection, n_of_m)
    if score == "magnitude":
        weights = _prune_without_inputs(model, selection, by_magnitude, fractions)
    else:
        method = _method(score, n_of_m, block_size=block_size, damping=damping)
        if calibration is None:
            raise ValueError(f"{score!r} needs `calibration`, batches of what the model is meant for.")
        batches = check_calibration(calibration)
        check_experts(batches, selection)
        weights = _prune_layer_by_layer(model, batches, selection, method, by_magnitude, fractions)
    return OneShotReport(weights, selection.skipped)


def prune_by_magnitude(
    weight: Tensor, sparsity: float, n_of_m: tuple[int, int] | None = None
) -> Tensor:
    """The weight (out, in) without its lowest |w|: exactly round(sparsity * weight.numel()) of them,
    or for n_of_m = (n, m) all but n of each m neighbours, and `sparsity` is not read."""
    if n_of_m is not None:
        return weight.masked_fill(~keep_n_of_m(weight.abs(), *n_of_m), 0)
    kept = weight.numel() - round(sparsity * weight.numel())
    (mask,) = keep_highest(magnitude, [(weight,)], kept)
    return weight.masked_fill(~mask, 0)


def _asked(
    model: nn.Module,
    sparsity: float | Mapping[str, float] | None,
    pattern: str,
    targets: str | Sequence[str] | None,
    ignore: str | Sequence[str] | None,
) -> tuple[tuple[int, int] | None, Selection, dict[str, float]]:
    """(n, m) of "N:M", the targets, and the sparsity of each."""
    if not isinstance(sparsity, Mapping):
        n_of_m, fraction = parse_pattern(pattern, sparsity)
        selection = find_targets(model, targets, ignore)
        return n_of_m, selection, dict.fromkeys(selection.targets, fraction)
    if parse_pattern(pattern, 0.0 if pattern == "unstructured" else None)[0] is not None:
        raise ValueError(
            f"`sparsity` is a dict, but pattern {pattern!r} says it: leave one of them out."
        )
    check_fractions(sparsity, targets)
    selection, groups = split_targets(model, sparsity, ignore)
    return None, selection, {name: sparsity[entry] for entry, group in groups.items() for name in group}


def _method(score: str, n_of_m: tuple[int, int] | None, *, block_size: int, damping: float) -> Method:
    if score == "wanda":
        return Method(
            add_squares,
            prepare=torch.sqrt,
            prune=lambda weight, norms, sparsity: weight.masked_fill(
                ~wanda_mask(weight, norms, sparsity=sparsity, n_of_m=n_of_m), 0
            ),
        )
    if score != "sparsegpt":
        raise ValueError(f"`score` is {score!r}; there are {', '.join(get_args(OneShotScore))}.")
    if isinstance(block_size, bool) or not isinstance(block_size, int) or block_size < 1:
        raise ValueError(f"`block_size` is {block_size!r}: it is a number of columns, such as 128.")
    if n_of_m is not None and block_size % n_of_m[1]:
        raise ValueError(
            f"`block_size` is {block_size}: make it a multiple of {n_of_m[1]}, lest it cut the groups."
        )
    check_damping(damping)
    return Method(
        add_gram,
        prepare=partial(inverse_factor, damping=damping),
        prune=lambda weight, factor, sparsity: sparsegpt(
            weight, factor, sparsity=sparsity, n_of_m=n_of_m, block_size=block_size
        ),
    )


def _prune_without_inputs(
    model: nn.Module,
    selection: Selection,
    by_magnitude: Callable[[Tensor, float], Tensor],
    fractions: Mapping[str, float],
) -> dict[str, PrunedWeight]:
    def prune(weight: Tensor, seen: Seen, sparsity: float) -> Tensor:
        return by_magnitude(weight, sparsity)

    found = {}
    for target in logging.tqdm(selection.targets.values(), desc="Pruning", unit="weight"):
        with in_memory(model, target.name) as param:
            nothing = [Seen() for _ in matrices(param, target)]
            found[target.name] = _prune_(param, target, nothing, fractions[target.name], prune)
    return found


def _prune_layer_by_layer(
    model: nn.Module,
    batches: Sequence[Batch],
    selection: Selection,
    method: Method,
    by_magnitude: Callable[[Tensor, float], Tensor],
    fractions: Mapping[str, float],
) -> dict[str, PrunedWeight]:
    targets = list(selection.targets.values())
    found = {}

    @lru_cache(maxsize=1)  # query, key and value come one after the other
    def prepared(seen: Seen) -> Tensor:
        return method.prepare(cast(Tensor, seen.total))

    def prune(weight: Tensor, seen: Seen, sparsity: float) -> Tensor:
        if seen.total is None:
            return by_magnitude(weight, sparsity)
        return method.prune(weight, prepared(seen).to(weight.device), sparsity)

    steps = layer_by_layer(model, batches, targets, method.accumulate, desc="Pruning")
    with closing(steps):
        for target, seen in steps:
            with in_memory(model, target.name) as param:
                found[target.name] = _prune_(param, target, seen, fractions[target.name], prune)
    return found


def _prune_(
    param: Tensor,
    target: Target,
    seen: Sequence[Seen],
    sparsity: float,
    prune: Callable[[Tensor, Seen, float], Tensor],
) -> PrunedWeight:
    lost = energy = 0.0
    for matrix, inputs in zip(matrices(param, target), seen, strict=True):
        dense = matrix.float().contiguous()
        pruned = prune(dense, inputs, sparsity)
        lost += _output_energy(dense - pruned, inputs.total)
        energy += _output_energy(dense, inputs.total)
        matrix.copy_(pruned)
    return PrunedWeight(
        size=param.numel(),
        zeros=param.numel() - int(param.count_nonzero()),
        error=lost / energy if energy else 0.0,
        positions=sum(inputs.positions for inputs in seen),
    )


def _output_energy(weight: Tensor, total: Tensor | None) -> float:
    """Sum of squares of the outputs of `weight` (out, in) over inputs with the statistic `total`."""
    if total is None:
        return weight.square().sum().item()
    total = total.to(weight.device)
    return ((weight @ total if total.dim() == 2 else weight * total) * weight).sum().item()


def parse_pattern(pattern: str, sparsity: float | None) -> tuple[tuple[int, int] | None, float]:
    """(n, m) of "N:M", None for "unstructured"; and the sparsity that it makes."""
    parsed = Pattern.parse(pattern)
    if not parsed.elementwise:
        raise ValueError(f"`pattern` is {pattern!r}; it is 'unstructured', or 'N:M' such as '2:4'.")
    if parsed.kept is None or parsed.group is None:
        return None, sparsity_of(parsed, sparsity)
    return (parsed.kept, parsed.group), sparsity_of(parsed, sparsity)
