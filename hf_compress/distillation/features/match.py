"""What a match says: which part of both models is compared, where, and how."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from hf_compress.distillation.features.distances import DISTANCES

RELATIONS = ("queries", "keys", "values")
SCORED = ("attention", *RELATIONS)
KINDS = ("hidden", "embeddings", "pooled", *SCORED)
TOKENS = ("all", "first", "last", "mean")
LAYER_MAPS = ("uniform", "skip", "last", "final", "closest")


@dataclass(frozen=True)
class Match:
    """One comparison of a student with its teacher, beside that of their outputs.

    what: "hidden" (what a layer gives; for the last one after the model's final norm), "embeddings"
        (what the first layer gets), "pooled" (what the model's pooler gives), "attention" (its maps),
        "queries", "keys" or "values" (how alike those of two tokens are: the relations of
        papers/2012.15828, of the vectors that attention multiplies), or the name of any module, whose
        output is compared.
    distance: "mse" (the default), "cosine", "normalized" or "relative" (see
        `hf_compress.distillation.features.distances`). Attention takes "kl" (of the maps; its default)
        or "mse" (of the scores before their softmax), relations only "kl".
    layers: which layers are compared: "uniform", "skip", "last", "final", "closest", or pairs of
        numbers (student's, teacher's), from 0, or from -1 backwards (see
        `hf_compress.distillation.features.layer_maps`). Their mean counts, not their sum.
    weight: of this match in the whole loss, >= 0.
    tokens: "all" (each that the attention mask shows; without a mask the mean over the positions of a
        row), or one vector for each row: "first", "last" or "mean" of those tokens. None for a module
        whose output has no positions.
    projection: whether a learned matrix takes the student's vectors to the teacher's width, where that
        is another. It is not part of the student, and dropped after the training.
    learning_rate: of the projection, > 0; None for that of the training.
    relation_heads: into how many heads queries, keys or values are cut anew, which must divide the
        widths of both models; None keeps their own heads, of which there must be equally many.
    stack: "encoder" or "decoder" in an encoder-decoder; None for both.
    teacher_module: the module of the teacher where `what` names one of the student; None for the same.
    name: under which it is logged, `loss_<name>`; by default `what`.

    Raises ValueError for settings out of range, or that do not go together.
    """

    what: str
    distance: str | None = field(default=None, kw_only=True)
    layers: str | Sequence[tuple[int, int]] = field(default="uniform", kw_only=True)
    weight: float = field(default=1.0, kw_only=True)
    tokens: str | None = field(default="all", kw_only=True)
    projection: bool = field(default=False, kw_only=True)
    learning_rate: float | None = field(default=None, kw_only=True)
    relation_heads: int | None = field(default=None, kw_only=True)
    stack: str | None = field(default=None, kw_only=True)
    teacher_module: str | None = field(default=None, kw_only=True)
    name: str | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        _check_number("weight", self.weight, zero=True)
        if self.learning_rate is not None:
            _check_number("learning_rate", self.learning_rate, zero=False)
        if self.distance_name not in self._distances:
            raise ValueError(
                f"`distance` is {self.distance!r}: for {self.what!r} it is one of "
                f"{', '.join(self._distances)}."
            )
        if isinstance(self.layers, str) and self.layers not in LAYER_MAPS:
            raise ValueError(
                f"`layers` is {self.layers!r}: pass one of {', '.join(LAYER_MAPS)}, or pairs of "
                "numbers (student's, teacher's)."
            )
        if self.layers != "uniform" and self.what not in ("hidden", *SCORED):
            raise ValueError(f"`layers` is {self.layers!r}, but {self.what!r} is not of a layer.")
        if self.layers == "closest" and self.what != "hidden":
            raise ValueError(f"the closest layers are found by hidden states, not by {self.what!r}.")
        if self.tokens not in (*TOKENS, None) or (self.what in SCORED and self.tokens != "all"):
            raise ValueError(
                f"`tokens` is {self.tokens!r}: pass one of {', '.join(TOKENS)}, or None for an output "
                "without positions; attention and relations are of all tokens."
            )
        heads = self.relation_heads
        number = isinstance(heads, int) and not isinstance(heads, bool) and heads >= 1
        if heads is not None and (self.what not in RELATIONS or not number):
            raise ValueError(
                f"`relation_heads` is {heads!r}: it is a number, 1 or more, for "
                f"{', '.join(RELATIONS)}, here of {self.what!r}."
            )
        if self.projection and self.what in SCORED:
            raise ValueError(f"{self.what!r} needs no projection: leave it out.")
        if self.learning_rate is not None and not self.projection:
            raise ValueError("`learning_rate` is that of a projection: pass projection=True too.")
        if self.teacher_module is not None and self.what in KINDS:
            raise ValueError(
                f"`teacher_module` goes with the name of a module, not with {self.what!r}."
            )

    @property
    def distance_name(self) -> str:
        return self.distance or ("kl" if self.what in SCORED else "mse")

    @property
    def _distances(self) -> tuple[str, ...]:
        if self.what == "attention":
            return ("kl", "mse")
        return ("kl",) if self.what in RELATIONS else tuple(DISTANCES)


def _check_number(name: str, value: float, *, zero: bool) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value < 0 or (value == 0 and not zero):
        raise ValueError(
            f"`{name}` is {value!r}: pass a number {'>=' if zero else '>'} 0, such as 1.0."
        )
