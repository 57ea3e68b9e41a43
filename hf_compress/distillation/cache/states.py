"""What happened inside a teacher when it was asked, for matches in a training without it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from hf_compress.devices import host
from hf_compress.distillation.cache.cells import STATES, Origin
from hf_compress.distillation.cache.keys import head_called
from hf_compress.distillation.features.items import token_mask
from hf_compress.distillation.features.recorder import Feature
from hf_compress.distillation.features.resolve import pooler_of
from hf_compress.distillation.stacks import find_stacks


def features_of(model: PreTrainedModel, what: str, layers: Sequence[int] | None) -> list[Feature]:
    """What is taken down of `model`: its "pooled" output, or the "hidden" states of `layers`.

    layers: numbers of each stack, from 0, or from -1 backwards; None for the last.
    Raises ValueError where the model has no pooler, or not so many layers.
    """
    if what == "pooled":
        if layers is not None:
            raise ValueError(f"`layers` is {list(layers)}, but the pooled output is of no layer.")
        return [Feature("module", pooler_of(model))]
    features = []
    for stack in find_stacks(model).values():
        depth = len(stack.layers)
        for number in [-1] if layers is None else layers:
            if isinstance(number, bool) or not isinstance(number, int) or not -depth <= number < depth:
                raise ValueError(
                    f"`layers` holds {number!r}, but {stack.path} has {depth} layers: 0 to "
                    f"{depth - 1}, or -1 to {-depth} from its end."
                )
            features.append(Feature("hidden", stack.name, number % depth))
    return features


def cut_states(
    values: Mapping[Feature, Tensor],
    batch: Mapping[str, Any],
    rows: int,
    dtype: torch.dtype | None,
) -> list[dict[str, Tensor]]:
    """For each row of `batch` what was taken down in it, on CPU: of tokens that are no padding where a
    mask says so. The choices of multiple choice belong to one row."""
    cut: list[dict[str, Tensor]] = [{} for _ in range(rows)]
    for feature, value in values.items():
        mask = _mask(feature, batch)
        parts = len(value) // rows
        for number, row in enumerate(cut):
            own = slice(number * parts, (number + 1) * parts)
            kept = value[own] if mask is None else value[own][mask[own]]
            row[_named(feature)] = kept.detach().to(host(), dtype)
    return cut


def joined_states(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Those of a batch of `rows`. Raises ValueError where they do not go together."""
    shapes = [{name: tuple(value.shape[1:]) for name, value in row.items()} for row in rows]
    if any(each != shapes[0] for each in shapes):
        raise ValueError(
            f"The states of the rows of a batch have the shapes {shapes}: without an attention mask "
            "they are of whole inputs, so pad all rows to one length in the dataset."
        )
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


class KeptStates:
    """In the place of a teacher's `Recorder`: what it would take down comes with the batch.

    names: of the states that the rows have.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names = set(names)

    def check(self, features: Iterable[Feature]) -> None:
        """Raises ValueError where one of `features` was not kept."""
        missing = sorted({_named(feature) for feature in features} - self._names)
        if missing:
            raise ValueError(
                f"`matches` compare {', '.join(missing)} (kind/place/layer) of the teacher, but kept "
                f"are only {', '.join(sorted(self._names))}. Use precompute_teacher(what='hidden', "
                "layers=[...]) or what='pooled' for these, and only such matches."
            )

    def take(self, batch: Mapping[str, Any]) -> dict[Feature, Tensor]:
        """As `Recorder.take`, of this batch. Raises ValueError where it has other tokens."""
        if STATES not in batch:
            raise ValueError(
                f"The rows have no column {STATES!r}: the dataset for training needs it in all rows."
            )
        taken = {}
        for name, values in batch[STATES].items():
            kind, place, layer = name.split("/")
            feature = Feature(kind, place, int(layer))
            mask = _mask(feature, batch)
            if mask is not None:
                if int(mask.sum()) != len(values):
                    raise ValueError(
                        f"The batch has {int(mask.sum())} tokens in {place}, the teacher had "
                        f"{len(values)}. Use the collator of `precompute_teacher`."
                    )
                whole = values.new_zeros(*mask.shape, values.shape[-1])
                whole[mask] = values
                values = whole
            taken[feature] = values
        return taken


def describe(config: PreTrainedConfig) -> str:
    """What `skeleton_of` needs to know."""
    return json.dumps({**json.loads(config.to_json_string()), "model_type": config.model_type})


def skeleton_of(origin: Origin) -> PreTrainedModel:
    """The teacher's modules without weights."""
    fields = json.loads(origin.config or "{}")
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    with torch.device("meta"):
        return head_called(origin.head).auto_class.from_config(config)


def _named(feature: Feature) -> str:
    return f"{feature.kind}/{feature.place}/{feature.layer}"


def _mask(feature: Feature, batch: Mapping[str, Any]) -> Tensor | None:
    return token_mask(batch, feature.place) if feature.kind == "hidden" else None
