"""The config of a model that has lost units: ordinary, or refused."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, PreTrainedModel

from hf_compress.pruning.structure.anatomy import Units
from hf_compress.pruning.structure.architectures import ARCHITECTURES
from hf_compress.pruning.structure.hidden import set_hidden_size_
from hf_compress.pruning.structure.units import find_units

Kept = Mapping[str, Sequence[int]]
"""The units that stay, by the name of their place (`Units.name`); places not named stay whole."""


def smaller_config(model: PreTrainedModel, kept: Kept) -> PreTrainedConfig:
    """A copy of the model's config, with the sizes that are left where only `kept` stays.

    Raises ValueError where not equally many stay everywhere, where fewer experts stay than each token
    goes to, and where the config's own rules forbid a size.
    """
    config = copy.deepcopy(model.config)
    everything = find_units(model)
    stay = {units.name: kept.get(units.name, range(units.count)) for units in everything}
    gone_layers = tuple(
        f"{layer}."
        for units in everything
        if units.kind == "layers"
        for number, layer in enumerate(units.readers)
        if number not in stay[units.name]
    )
    places: dict[tuple[str, ...], Units] = {}
    for units in everything:
        if units.kind != "layers" and all(name.startswith(gone_layers) for name in units.readers):
            continue
        other = places.setdefault(units.fields, units)
        if len(stay[units.name]) != len(stay[other.name]):
            raise ValueError(
                f"the config has one `{units.fields[0]}` for all, but {len(stay[other.name])} would "
                f"stay in {other.name} and {len(stay[units.name])} in {units.name}: keep equally many."
            )
        _set_sizes(config, model.config, units, stay[units.name])
    if any(u.kind == "experts" and len(stay[u.name]) < config.num_experts_per_tok for u in everything):
        raise ValueError(
            f"each token goes to {config.num_experts_per_tok} experts (`num_experts_per_tok`), and "
            "fewer would stay: remove fewer `experts`."
        )
    try:
        config.validate()
    except StrictDataclassError as error:
        raise ValueError(
            f"{type(config).__name__} forbids what would be left: {error} Pass another fraction, or "
            "another `round_to`."
        ) from error
    return config


def check_numbers(units: Units, kept: Sequence[int]) -> None:
    """Raises ValueError where `kept` are not rising numbers of `units`."""
    if not kept or list(kept) != sorted({*kept}) or kept[0] < 0 or kept[-1] >= units.count:
        raise ValueError(
            f"{list(kept)} cannot stay of {units.name}: pass rising numbers from 0 to "
            f"{units.count - 1}, at least one."
        )


def _set_sizes(
    config: PreTrainedConfig, old: PreTrainedConfig, units: Units, stay: Sequence[int]
) -> None:
    if len(stay) == units.count:
        return
    hidden = ARCHITECTURES[config.model_type].hidden
    if units.kind == "hidden" and hidden is not None:
        set_hidden_size_(config, hidden, len(stay))
        return
    if units.kind == "heads":
        # Classes that would derive it from the hidden size take it from here.
        (matrix, *_) = units.reading
        config.head_dim = matrix.param.shape[matrix.dim] // getattr(old, units.fields[0])
    for field in units.fields:
        size = getattr(old, field)
        # GPT-2 may leave the size of its feed-forward layers unsaid.
        setattr(config, field, len(stay) if size is None else size * len(stay) // units.count)
    types = getattr(old, "layer_types", None)
    if units.kind == "layers" and types is not None:
        config.layer_types = [types[number] for number in stay]
