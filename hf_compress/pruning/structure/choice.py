"""Which units stay: how many everywhere, and the best of each place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor
from transformers import PreTrainedModel

from hf_compress.calibration.batches import Batch
from hf_compress.pruning.structure.anatomy import Units
from hf_compress.pruning.structure.architectures import Kind
from hf_compress.pruning.structure.config import check_numbers, smaller_config
from hf_compress.pruning.structure.scores import UnitScore, score_units
from hf_compress.pruning.structure.units import find_units

Layers = int | Sequence[int]
ROUNDED: dict[Kind, str] = {"ffn": "neurons", "hidden": "features"}
"""What there is so many of that any fraction is one of whole units."""


def choose_units(
    model: PreTrainedModel,
    *,
    ffn: float = 0.0,
    heads: float = 0.0,
    experts: float = 0.0,
    hidden: float = 0.0,
    layers: Layers | Mapping[str, Layers] | None = None,
    score: UnitScore = "taylor",
    calibration: Iterable[Batch] | None = None,
    round_to: int = 1,
    seed: int = 0,
) -> dict[str, list[int]]:
    """What `hf_compress.pruning.structure.removal.prune_structure` keeps, to look at or to change
    before it goes to `remove_units` or `zero_units_`. Arguments and errors as there."""
    fractions: dict[Kind, float] = {
        "ffn": ffn,
        "heads": heads,
        "experts": experts,
        "hidden": hidden,
    }
    for kind, fraction in fractions.items():
        check_fraction(kind, fraction)
    check_round_to(round_to)
    kinds = [kind for kind, fraction in fractions.items() if fraction > 0]
    if not kinds and layers is None:
        raise ValueError("nothing to remove: pass `ffn`, `heads`, `experts`, `hidden` or `layers`.")
    inside = find_units(model, kinds)
    counts = {u.name: count_kept(u, fractions[u.kind], round_to) for u in inside}
    kept: dict[str, list[int]] = {}
    stacks: list[Units] = []
    if layers is not None:
        stacks = find_units(model, ["layers"])
        for stack, wanted in _by_stack(stacks, layers).items():
            if isinstance(wanted, int):
                counts[stack] = wanted
            else:
                kept[stack] = list(wanted)
    # All that can be refused is, before the model runs.
    sizes: dict[str, Sequence[int]] = {name: range(count) for name, count in counts.items()}
    smaller_config(model, {**sizes, **kept})
    ranked = [u for u in (*inside, *stacks) if u.name in counts]
    if ranked:
        scores = score_units(model, ranked, score=score, calibration=calibration, seed=seed)
        kept |= {name: highest(values, counts[name]) for name, values in scores.items()}
    return kept


def highest(scores: Tensor, count: int) -> list[int]:
    """The units of the `count` highest scores (of equal ones the earlier), in their order."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values.tolist()


def check_fraction(kind: str, fraction: float) -> None:
    """Raises ValueError where `fraction` is not in [0, 1)."""
    number = isinstance(fraction, (int, float)) and not isinstance(fraction, bool)
    if not number or not 0.0 <= fraction < 1.0:
        raise ValueError(
            f"`{kind}` is {fraction!r}: it is the fraction that goes, in [0, 1). For half pass 0.5."
        )


def check_round_to(round_to: int) -> None:
    """Raises ValueError where `round_to` is no number of neurons or hidden features."""
    if isinstance(round_to, bool) or not isinstance(round_to, int) or round_to < 1:
        raise ValueError(f"`round_to` is {round_to!r}: pass a number of neurons, 1 or more, such as 8.")


def count_kept(units: Units, fraction: float, round_to: int = 1) -> int:
    """How many of `units` stay when `fraction` goes; of neurons and hidden features, the nearest
    multiple of `round_to`.

    Raises ValueError where that is none or all of them, or parts of a head or an expert.
    """
    exact = units.count * (1.0 - fraction)
    rounded = ROUNDED.get(units.kind)
    kept = round_to * round(exact / round_to) if rounded else round(exact)
    if (rounded or abs(exact - kept) < 1e-6) and 0 < kept < units.count:
        return kept
    if rounded:
        raise ValueError(
            f"`{units.kind}` of {fraction} in multiples of {round_to} leaves {kept} of {units.count} "
            f"{rounded} in {units.name}: pass another fraction, or a smaller `round_to`."
        )
    what = "heads (or groups that share keys and values)" if units.kind == "heads" else units.kind
    possible = ", ".join(f"{gone}/{units.count}" for gone in range(1, units.count)) or "none"
    raise ValueError(
        f"`{units.kind}` of {fraction}: {units.name} has {units.count} {what}, of which whole ones go; "
        f"possible are {possible}."
    )


def _by_stack(stacks: Sequence[Units], layers: Layers | Mapping[str, Layers]) -> dict[str, Layers]:
    """How many layers stay, or which, by the name of the stack."""
    if not isinstance(layers, Mapping):
        result = {stack.name: layers for stack in stacks}
    else:
        result = {}
        for part, wanted in layers.items():
            named = [stack.name for stack in stacks if part in stack.name.split(".")]
            if not named:
                raise ValueError(
                    f"`layers` names {part!r}, but the layers of this model are in "
                    f"{', '.join(stack.name for stack in stacks)}."
                )
            result.update(dict.fromkeys(named, wanted))
    for stack in stacks:
        if stack.name in result:
            _check_layers(stack, result[stack.name])
    return result


def _check_layers(stack: Units, wanted: Layers) -> None:
    if isinstance(wanted, int) and not isinstance(wanted, bool):
        if not 1 <= wanted <= stack.count:
            raise ValueError(
                f"`layers` is {wanted}: {stack.name} has {stack.count}, so keep 1 to {stack.count}."
            )
    elif isinstance(wanted, (list, tuple, range)):
        check_numbers(stack, wanted)
    else:
        raise ValueError(f"`layers` is {wanted!r}: pass how many to keep, or a list of their numbers.")
