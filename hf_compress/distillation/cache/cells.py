"""One row's share of a teacher's answers as bytes: a safetensors file that says what is in it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

OUTPUTS, STATES = "teacher_outputs", "teacher_states"
"""The columns that hold them, and the entries of a batch made of these."""

_SMALL = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where answers come from: equal for all rows of a dataset, or they do not belong together.

    what: "logits", "topk" or "sampled", or of states "hidden" or "pooled". head: the name of the
    teacher's. teacher: the fingerprint of its weights, precision: what it computed in, name: under
    which it was loaded. classes: of its answers, None where they depend on the input; cut: whether it
    has more. labels: their names, where it predicts labels. same: of its config what `Head.same` names.
    temperature: at which probabilities were kept. config: of states, the teacher's, in JSON.
    """

    what: str
    head: str
    teacher: str
    precision: str
    name: str
    classes: int | None = None
    cut: bool = False
    labels: tuple[str, ...] | None = None
    same: tuple[Any, ...] = ()
    temperature: float | None = None
    config: str | None = None

    def to_json(self) -> str:
        """What is not as by default, in short."""
        given = {name: value for name, value in asdict(self).items() if value not in (None, False, ())}
        return json.dumps(given, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Origin:
        fields: dict[str, Any] = json.loads(text)
        lists = {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
        return cls(**{**fields, **lists})


@dataclass(frozen=True)
class Cell:
    """The answers of one row, the key of its inputs, and the JSON of their `Origin`."""

    answers: dict[str, Tensor]
    key: str
    origin: str


def to_bytes(answers: Mapping[str, Tensor], key: str, origin: str) -> bytes:
    tensors = {name: value.contiguous() for name, value in answers.items()}
    if "ids" in tensors:
        ids = tensors.pop("ids")
        if (high := ids // _SMALL).any():
            tensors["high"] = high.to(torch.uint8)
        tensors["ids"] = (ids % _SMALL).to(torch.uint16)
    return save(tensors, metadata={"key": key, "origin": origin})


def from_bytes(cell: bytes) -> Cell:
    """Raises ValueError for anything that `to_bytes` did not make."""
    try:
        length = int.from_bytes(cell[:8], "little")
        marks = json.loads(cell[8 : 8 + length])["__metadata__"]
        answers = load(cell)
        key, origin = marks["key"], marks["origin"]
    except Exception as error:
        raise ValueError(
            "A column of the teacher's answers does not hold what `precompute_teacher` writes there."
        ) from error
    if "ids" in answers:
        ids = answers["ids"].long()
        answers["ids"] = ids + _SMALL * answers.pop("high").long() if "high" in answers else ids
    return Cell(answers, key, origin)
