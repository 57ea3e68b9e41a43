"""Structure that is really removed: the result is a smaller ordinary model of the same class.

Everywhere equally many units go, since that is what a stock config can say; which ones is chosen in
each place on its own.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_compress.calibration.batches import Batch
from hf_compress.pruning.structure.anatomy import Units
from hf_compress.pruning.structure.choice import Layers, choose_units
from hf_compress.pruning.structure.config import Kept, check_numbers, smaller_config
from hf_compress.pruning.structure.scores import UnitScore
from hf_compress.pruning.structure.units import find_units

Cut = tuple[int, Tensor]
"""A dimension, and the entries that stay of it."""


def prune_structure(
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
) -> PreTrainedModel:
    """A new, physically smaller model of the same class; saved, it loads with plain `from_pretrained`.

    ffn, heads, experts: the fraction in [0, 1) to remove of the feed-forward neurons, of the attention
        heads (whole groups where heads share keys and values), and of the experts of a mixture.
        Heads and experts must come out whole; neurons are rounded to the nearest.
    hidden: the same of the features of the residual stream, of which one is gone in all layers and
        embeddings. Only where RMSNorms read it, so that what stays computes the same (see
        `hf_compress.pruning.structure.hidden`).
    layers: how many layers to keep, or a list of the numbers of those to keep (from 0). It holds for
        both stacks of an encoder-decoder, unless it says {"encoder": ..., "decoder": ...}.
    score: what decides who stays (see `hf_compress.pruning.structure.scores`): "taylor" (needs labels),
        "activation", "magnitude" or "random" (of `seed`). Everything is scored in the whole model.
    calibration: batches as the model's forward takes them, for "taylor" and "activation".
    round_to: as many neurons and hidden features stay as a multiple of it; 8 or 64 suit most kernels.
        Llama's config wants a multiple of the number of heads of the latter.

    The given model is unchanged and shares no weight with the new one, in which everything is
    trainable that its class makes so. Memory: both models.
    Raises ValueError for a model that cannot lose what is asked (saying what it can), for fractions
    and layers out of range or that leave nothing, and for missing calibration data.
    """
    kept = choose_units(
        model,
        ffn=ffn,
        heads=heads,
        experts=experts,
        hidden=hidden,
        layers=layers,
        score=score,
        calibration=calibration,
        round_to=round_to,
        seed=seed,
    )
    return remove_units(model, kept)


def remove_units(model: PreTrainedModel, kept: Kept) -> PreTrainedModel:
    """A new model of the same class with only the units in `kept`, of the places that it names.

    Raises ValueError for unknown places and units, and where not equally many would stay everywhere.
    """
    named = _named(model, kept)
    config = smaller_config(model, kept)
    cuts: dict[Tensor, list[Cut]] = {}
    for units in named:
        for piece in units.slices:
            cut = (piece.dim, piece.entries(kept[units.name]))
            cuts.setdefault(piece.param, []).append(cut)
    state = {
        name: _cut(value, cuts.get(value, ()))  # tied weights are one parameter of several names
        for name, value in model.state_dict(keep_vars=True).items()
    }
    for units in named:
        for name in units.rescaled:
            state[name] *= math.sqrt(units.count / len(kept[units.name]))
    for units in named:
        if units.kind == "layers":
            state = _renumbered(state, units, kept[units.name])
    smaller = type(model)(config)
    # Assigned, so that each weight keeps its own dtype; that unties them. Strict is the last check.
    smaller.load_state_dict(state, assign=True)
    smaller.tie_weights()
    nn.Module.to(smaller, model.device)
    if model.can_generate():
        smaller.generation_config = copy.deepcopy(model.generation_config)
    return smaller.train(model.training)


@torch.no_grad()
def zero_units_(model: PreTrainedModel, kept: Kept) -> None:
    """Zero all that the units not in `kept` own, so that the model computes what it would without them.

    Raises ValueError for layers, whose normalization would still act, and for experts, which a router
    would still choose: those can only be removed.
    """
    for units in _named(model, kept):
        if units.kind in ("layers", "experts"):
            raise ValueError(f"{units.kind} ({units.name}) cannot be zeroed, only removed.")
        zero_(units, sorted({*range(units.count)} - {*kept[units.name]}))


def shrink(model: PreTrainedModel) -> PreTrainedModel:
    """A new model without the neurons, heads and hidden features of `model` that are wholly zero; it
    computes the same.

    Raises ValueError where there are none, or not equally many everywhere (after a training that
    ended before its schedule).
    """
    units = [u for u in find_units(model) if u.kind not in ("experts", "layers")]
    kept = {u.name: alive(u).nonzero().flatten().tolist() for u in units}
    if all(len(kept[u.name]) == u.count for u in units):
        raise ValueError(
            f"no neuron, head or hidden feature of this {type(model).__name__} is wholly zero: train "
            "it with StructuredPruningCallback first, or call prune_structure."
        )
    return remove_units(model, kept)


def alive(units: Units) -> Tensor:
    """Bool (count,): the units that own at least one weight that is not zero."""
    counts = [piece.by_unit((piece.param.detach() != 0).long()).cpu() for piece in units.slices]
    return torch.stack(counts).sum(0) > 0


def zero_(units: Units, gone: Sequence[int] | Tensor) -> None:
    """Zero all that the units numbered in `gone` own."""
    for piece in units.slices:
        piece.param.index_fill_(piece.dim, piece.entries(gone), 0)


def _named(model: PreTrainedModel, kept: Kept) -> list[Units]:
    """The units that `kept` speaks of."""
    known = {units.name: units for units in find_units(model)}
    for name, numbers in kept.items():
        if name not in known:
            raise ValueError(f"{name!r} is no place of units; there are {', '.join(known)}.")
        check_numbers(known[name], numbers)
    return [known[name] for name in kept]


def _cut(value: Tensor, cuts: Sequence[Cut]) -> Tensor:
    """A copy, of only the given entries of dimensions."""
    result = value.detach()
    for dim, entries in cuts:
        result = result.index_select(dim, entries)
    return result if cuts else result.clone()


def _renumbered(state: dict[str, Tensor], stack: Units, kept: Sequence[int]) -> dict[str, Tensor]:
    new = {f"{stack.name}.{old}.": f"{stack.name}.{number}." for number, old in enumerate(kept)}
    result = {}
    for name, value in state.items():
        if not name.startswith(f"{stack.name}.") or (stack.pinned and name.startswith(stack.pinned)):
            result[name] = value
            continue
        number, _, rest = name.removeprefix(f"{stack.name}.").partition(".")
        if (prefix := f"{stack.name}.{number}.") in new:
            result[new[prefix] + rest] = value
    return result
