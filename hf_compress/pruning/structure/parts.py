"""What can be removed of a model in steps, one kind of structure or stack of layers alone, and what a
choice among these steps would cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from hf_compress.pruning.structure.anatomy import Units
from hf_compress.pruning.structure.choice import ROUNDED, count_kept, highest
from hf_compress.pruning.structure.config import smaller_config
from hf_compress.pruning.structure.scores import Scores

EIGHTHS = 8
MOST_OPTIONS = 16


@dataclass(frozen=True)
class Part:
    """What can be removed by one setting: the fraction of a kind that goes, or the layers of a stack.

    left: how much stays by each option; all of it (1.0) is the first.
    """

    setting: str
    stack: str | None
    options: dict[float, dict[str, list[int]]]
    units: tuple[Units, ...]

    @property
    def left(self) -> tuple[float, ...]:
        return (1.0, *self.options)


def find_parts(
    model: PreTrainedModel, units: Sequence[Units], scores: Scores, round_to: int
) -> list[Part]:
    """Each kind, and the layers of each stack, with the units that `scores` keep by each option, as far
    as the config allows it alone."""
    parts = []
    for kind in dict.fromkeys(u.kind for u in units if u.kind != "layers"):
        inside = tuple(u for u in units if u.kind == kind)
        steps = EIGHTHS if kind in ROUNDED else min(u.count for u in inside)
        options = {}
        for gone in range(1, steps):
            try:
                counts = {u.name: count_kept(u, gone / steps, round_to) for u in inside}
                kept = {name: highest(scores[name], count) for name, count in counts.items()}
                smaller_config(model, kept)
            except ValueError:  # no whole units, or what the config forbids
                continue
            options[1 - gone / steps] = kept
        parts.append(Part(kind, None, _thinned(options), inside))
    for stack in (u for u in units if u.kind == "layers"):
        options = {
            count / stack.count: {stack.name: highest(scores[stack.name], count)}
            for count in range(stack.count - 1, 0, -1)
        }
        parts.append(Part("layers", stack.name, _thinned(options), (stack,)))
    return [part for part in parts if part.options]


def _thinned(options: dict[float, dict[str, list[int]]]) -> dict[float, dict[str, list[int]]]:
    step = -(-len(options) // MOST_OPTIONS)
    return {left: options[left] for left in list(options)[step - 1 :: step or 1]}


def kept_by(parts: Sequence[Part], choice: Sequence[float]) -> dict[str, list[int]]:
    """The units that stay, by name; `choice` tells for each part how much is left of it."""
    kept = [part.options[left] for part, left in zip(parts, choice, strict=True) if left < 1]
    return {name: units for each in kept for name, units in each.items()}


def is_possible(model: PreTrainedModel, parts: Sequence[Part], choice: Sequence[float]) -> bool:
    """Whether the config allows what its parts alone do: Llama's counts hidden features by heads."""
    try:
        smaller_config(model, kept_by(parts, choice))
    except ValueError:
        return False
    return True


def shares_by_stack(part: Part, stacks: Iterable[Units]) -> dict[str, float]:
    """How much of a part lies in the layers of each stack that can lose some."""
    places = [reader for units in part.units for reader in units.readers]
    return {
        stack.name: sum(place.startswith(f"{stack.name}.") for place in places) / len(places)
        for stack in stacks
    }


def predicted_cost(
    parts: Sequence[Part],
    choice: Sequence[float],
    shares: Sequence[float],
    weights: Sequence[Mapping[str, float]],
) -> float:
    """Of a choice, as a fraction of what the whole model costs.

    shares: for each part what of the cost would go with all of it; weights: `shares_by_stack` of each.

    What layers cost is in proportion to their number, and what is inside goes with them; all that is
    left is in proportion to the hidden features.
    """
    depth = {part.stack: left for part, left in zip(parts, choice, strict=True) if part.stack}
    price = width = 1.0
    for part, left, share, by_stack in zip(parts, choice, shares, weights, strict=True):
        if part.setting == "hidden":
            width -= share * (1 - left)
            continue
        alive = 1.0
        if part.stack is None:
            alive -= sum(weight * (1 - depth[stack]) for stack, weight in by_stack.items())
        price -= share * (1 - left) * alive
    return price * width


def settings_of(
    parts: Sequence[Part], choice: Sequence[float], units: Sequence[Units]
) -> dict[str, Any]:
    """A choice as `prune_structure` takes it."""
    settings: dict[str, Any] = {}
    layers = {u.name: u.count for u in units if u.kind == "layers"}
    whole = dict(layers)
    for part, left in zip(parts, choice, strict=True):
        if part.stack is not None:
            layers[part.stack] = round(left * layers[part.stack])
        elif left < 1:
            settings[part.setting] = 1 - left
    if layers == whole:
        return settings
    if len(layers) == 1:
        return settings | {"layers": next(iter(layers.values()))}
    common = set.intersection(*(set(stack.split(".")) for stack in layers))
    own = {stack: next(n for n in stack.split(".") if n not in common) for stack in layers}
    return settings | {"layers": {own[stack]: count for stack, count in layers.items()}}
