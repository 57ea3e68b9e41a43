"""Allocations: how a sparsity is shared out among the weights.

Each takes the weights by name, such as `find_targets(model).parameters`, and returns for each the
fraction of it that is to be zero, as `PruningCallback(sparsity=...)` takes it. All weights together
are then as sparse as asked, to the last zero: the pruner rounds each fraction to the number it is of.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import pairwise

from torch import Tensor

from hf_compress.pruning.masks import check_sparsity

Fractions = dict[str, float]
Curve = Mapping[float, float]
"""How much worse a model gets, by the sparsity of one of its weights."""


def uniform(weights: Mapping[str, Tensor], sparsity: float) -> Fractions:
    """The same fraction of each weight, up to whole zeros."""
    return _reach(weights, sparsity, lambda level: dict.fromkeys(weights, level), high=1.0)


def erk(weights: Mapping[str, Tensor], sparsity: float) -> Fractions:
    """ERK, papers/1911.11134: an (out, in) matrix keeps a part proportional to (out + in) / (out * in),
    hence large ones become sparser; those that would keep more than all stay dense.

    Of stacked experts (experts, out, in) each is a matrix; of a convolution (out, in, height, width)
    the kernel counts in both the sum and the product.
    """
    part = {}
    _check_weights(weights)
    for name, weight in weights.items():
        shape = weight.shape[1:] if weight.dim() == 3 else weight.shape
        part[name] = sum(shape) / math.prod(shape)
    least = min(part.values(), default=1.0)
    # From all dense to all zero; in between the smaller matrices are still dense.
    return _reach(
        weights,
        sparsity,
        lambda level: {name: 1 - (1 - level) * part[name] / least for name in weights},
        high=1.0,
    )


def owl(
    weights: Mapping[str, Tensor],
    sparsity: float,
    outliers: Mapping[str, float],
    *,
    spread: float = 0.08,
) -> Fractions:
    """OWL, papers/2310.05175: what holds more outliers stays denser, linearly between the extremes.

    outliers: the part of each weight that is outlying, see `hf_compress.pruning.outliers`. The paper
        gives all weights of a transformer block one number.
    spread: half the distance in [0, 1] between the sparsest and the densest weight.

    Raises ValueError where `outliers` lacks a weight or has no fraction of it, or `spread` is none.
    """
    _check_all(weights, outliers, "outliers")
    for name in weights:
        if not 0.0 <= outliers[name] <= 1.0:
            raise ValueError(
                f"`outliers` has {outliers[name]!r} for {name}: a part of its weights lies in [0, 1], "
                "as `hf_compress.pruning.outliers.outlier_ratios` measures it."
            )
    if not isinstance(spread, int | float) or not 0.0 <= spread <= 0.5:
        raise ValueError(f"`spread` is {spread!r}: it lies in [0, 0.5]; the paper takes 0.08.")
    ratios = [outliers[name] for name in weights]
    least, most = min(ratios, default=0.0), max(ratios, default=0.0)
    slope = 2 * spread / (most - least) if most > least else 0.0
    return _reach(
        weights,
        sparsity,
        lambda level: {name: level - slope * (outliers[name] - least) for name in weights},
        high=1.0 + 2 * spread,
    )


def by_sensitivity(
    weights: Mapping[str, Tensor], sparsity: float, curves: Mapping[str, Curve]
) -> Fractions:
    """Each weight as sparse as it can be for one and the same harm, which is found by bisection.

    curves: for each weight how much worse the model gets when it alone has some sparsity, such as
        `Sensitivity.harm()`. Between its points, and from no harm at 0, a curve is straight; where it
        falls it is taken as level, since pruning more does not mend what pruning less has broken. No
        weight becomes sparser than the last finite point of its curve.

    Raises ValueError where `curves` lacks a weight, has points that are no sparsities in [0, 1), or
    does not go as far as the sparsity needs.
    """
    _check_all(weights, curves, "curves")
    for name in weights:
        for point in curves[name]:
            check_sparsity(point)
    rising = {name: _rising(curves[name]) for name in weights}
    worst = max((points[-1][1] for points in rising.values()), default=0.0)

    def bearable(harm: float) -> Fractions:
        # Below none: all weights go the same part of what costs nothing.
        part = min(1.0 + harm, 1.0)
        return {name: part * _furthest(points, max(harm, 0.0)) for name, points in rising.items()}

    return _reach(weights, sparsity, bearable, low=-1.0, high=worst)


def _reach(
    weights: Mapping[str, Tensor],
    sparsity: float,
    family: Callable[[float], Fractions],
    *,
    low: float = 0.0,
    high: float,
) -> Fractions:
    """The member of `family` that has the sparsity, in whole zeros, found by bisection.

    family: of a number to fractions that rise with it, from all dense at `low` on; outside of [0, 1]
        they are cut.
    """
    check_sparsity(sparsity)
    _check_weights(weights)
    sizes = {name: weight.numel() for name, weight in weights.items()}
    # At least one of a weight is kept: a fraction of 1 is refused when it is pruned.
    limits = {name: size - 1 for name, size in sizes.items()}
    due = round(sparsity * sum(sizes.values()))

    def zeros(level: float) -> dict[str, float]:
        fractions = family(level)
        return {n: min(max(fractions[n] * size, 0.0), limits[n]) for n, size in sizes.items()}

    if sum(zeros(high).values()) < due - 0.5:
        most = sum(zeros(high).values()) / sum(sizes.values())
        raise ValueError(
            f"`sparsity` {sparsity} cannot be shared out: the weights can take {most:.4f} at most. Ask "
            "for less, or measure curves at higher sparsities."
        )
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if sum(zeros(middle).values()) < due else (low, middle)
    counts = _whole(zeros(low), zeros(high), due)
    return {name: count / sizes[name] for name, count in counts.items()}


def _whole(below: Mapping[str, float], above: Mapping[str, float], due: int) -> dict[str, int]:
    """Whole numbers between `below` and `above`, or next to them, that sum to `due`."""
    span = sum(above.values()) - sum(below.values())
    # Where a family jumps at the level found, all weights go the same part of their jump.
    part = min(max((due - sum(below.values())) / span, 0.0), 1.0) if span > 0 else 1.0
    exact = {name: below[name] + part * (above[name] - below[name]) for name in below}
    counts = {name: int(value) for name, value in exact.items()}
    by_rest = sorted(exact, key=lambda name: counts[name] - exact[name])
    for name in by_rest[: due - sum(counts.values())]:
        counts[name] += 1
    return counts


def _rising(curve: Curve) -> list[tuple[float, float]]:
    """Points of sparsity and harm from (0, 0) on, up to the first that is not finite."""
    points = [(0.0, 0.0)]
    for sparsity, harm in sorted(curve.items()):
        if not math.isfinite(harm):
            break
        points.append((sparsity, max(harm, points[-1][1])))
    return points


def _furthest(points: list[tuple[float, float]], harm: float) -> float:
    """The highest sparsity that does no more than `harm`."""
    for (left, less), (right, more) in pairwise(points):
        if more > harm:
            return left + (right - left) * (harm - less) / (more - less)
    return points[-1][0]


def _check_weights(weights: Mapping[str, Tensor]) -> None:
    if not isinstance(weights, Mapping) or not weights:
        given = f"a {type(weights).__name__}" if not isinstance(weights, Mapping) else "empty"
        raise ValueError(
            f"`weights` is {given}, no weights to share the sparsity out among: pass "
            "`find_targets(model).parameters`."
        )


def _check_all(weights: Mapping[str, Tensor], given: Mapping[str, object], argument: str) -> None:
    _check_weights(weights)
    if missing := [name for name in weights if name not in given]:
        raise ValueError(
            f"`{argument}` lacks {len(missing)} weights, {missing[:3]} among them: give each a value."
        )
