"""Which candidates train on: successive halving (arXiv:1502.07943), between a score and a cost.

Where a limit on the score is given, candidates are ranked by fronts of cost and score as in
multi-objective halving (arXiv:2106.12639), and a score above what is asked counts as no better: so
whatever is larger than one that is good enough already is stopped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Rung:
    """Trainings of `steps` optimizer steps each, after which `keep` candidates go on."""

    steps: int
    keep: int


def rungs(
    candidates: int, steps: int, *, finalists: int = 3, factor: int = 3, shortest: int = 10
) -> list[Rung]:
    """The rungs before the full trainings of `steps`; none where that many candidates are finalists,
    or where to train them all costs no more.

    Each has `factor` times the steps of the one before and leaves a `factor`-th of its candidates. The
    first is not shorter than `shortest` steps; where that leaves too few rungs, the last stops more.

    Raises ValueError for numbers below 1, and a `factor` below 2.
    """
    for name, value in (("candidates", candidates), ("steps", steps), ("finalists", finalists)):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    if factor < 2:
        raise ValueError(f"`factor` must be at least 2, got {factor}.")
    found: list[Rung] = []
    if candidates <= finalists:
        return found
    wanted = max(1, math.ceil(math.log(candidates / finalists, factor) - 1e-9))
    count = max(1, min(wanted, int(math.log(max(1, steps / shortest), factor) + 1e-9)))
    for number in range(1, count + 1):
        left = math.ceil(candidates / factor**number)
        found.append(
            Rung(
                steps=max(1, steps // factor ** (count - number + 1)),
                keep=finalists if number == count else max(finalists, left),
            )
        )
    going_in = [candidates, *(rung.keep for rung in found)]
    spent = sum(n * rung.steps for n, rung in zip(going_in, found, strict=False))
    return found if spent + finalists * steps < candidates * steps else []


def ranked(
    items: Sequence[T],
    scores: Sequence[float],
    costs: Sequence[float],
    *,
    enough: float | None = None,
) -> list[T]:
    """`items`, those first that should train on.

    scores: higher is better. costs: lower is better. enough: the score that is asked for; None for the
    highest score at any cost. Of equals the cheaper is first, then the one that was given first.
    """
    places = list(range(len(items)))
    if enough is None:
        return [items[i] for i in sorted(places, key=lambda i: (-scores[i], costs[i], i))]
    capped = [min(score, enough) for score in scores]
    order: list[int] = []
    while places:
        front = nondominated([(-capped[i], costs[i]) for i in places])
        chosen = [places[i] for i in front]
        order += sorted(chosen, key=lambda i: (-capped[i], costs[i], i))
        places = [i for i in places if i not in set(chosen)]
    return [items[i] for i in order]


def nondominated(points: Sequence[tuple[float, ...]]) -> list[int]:
    """Places of the points that no other is below in one value and not above in any; of equal points
    the first."""
    kept = []
    for i, point in enumerate(points):
        beaten = any(
            all(a <= b for a, b in zip(other, point, strict=True)) and (other != point or j < i)
            for j, other in enumerate(points)
            if j != i
        )
        if not beaten:
            kept.append(i)
    return kept
