"""Recipes to choose among: plain settings, and grids of them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

_FRACTIONS = ("ffn", "heads", "sparsity")
_COUNTS = ("layers", "student_layers")
_SWITCHES = ("vocabulary", "distil")
_GROUP = 32  # weights that share a scale below 8 bits


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to compress a model; the defaults change nothing.

    layers: how many stay, by their Taylor scores (`prune_structure`).
    student_layers: how many are copied, evenly spaced (`init_student`).
    ffn, heads: fraction in [0, 1) of the neurons and attention heads that are removed.
    vocabulary: whether only the tokens of the training texts stay (`prune_vocabulary`).
    sparsity: fraction in [0, 1) of zeros, trained by a `PruningCallback`. They save no bytes by
        themselves.
    bits: of the weights, 2 to 8, trained by a `QuantizationCallback` and stored as integers.
    distil: whether the dense model teaches.

    Raises ValueError for values of another type or out of range.
    """

    layers: int | None = None
    student_layers: int | None = None
    ffn: float = 0.0
    heads: float = 0.0
    vocabulary: bool = False
    sparsity: float = 0.0
    bits: int | None = None
    distil: bool = True

    def __post_init__(self) -> None:
        for name in _FRACTIONS:
            value = getattr(self, name)
            if not _is_number(value) or not 0 <= value < 1:
                raise ValueError(f"`{name}` is {value!r}: pass a fraction in [0, 1), such as 0.5.")
        for name in _COUNTS:
            value = getattr(self, name)
            if value is not None and (not _is_whole(value) or value < 1):
                raise ValueError(f"`{name}` is {value!r}: pass how many stay, 1 or more, or null.")
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"`{name}` is {getattr(self, name)!r}: pass true or false.")
        if self.bits is not None and (not _is_whole(self.bits) or not 2 <= self.bits <= 8):
            raise ValueError(f"`bits` is {self.bits!r}: pass 2 to 8, or null for floats.")
        if self.layers is not None and self.student_layers is not None:
            raise ValueError("`layers` and `student_layers` both choose the depth: give one of them.")

    @property
    def name(self) -> str:
        """Short, and another one for each candidate; fit for a folder."""
        parts = []
        for count, word in ((self.layers, "layers"), (self.student_layers, "evenlayers")):
            parts += [f"{count}{word}"] if count is not None else []
        for fraction, word in ((self.ffn, "ffn"), (self.heads, "heads"), (self.sparsity, "sparse")):
            parts += [f"{word}{fraction:g}"] if fraction else []
        parts += ["vocabulary"] if self.vocabulary else []
        parts += [f"{self.bits}bit"] if self.bits is not None else []
        parts += [] if self.distil else ["alone"]
        return "-".join(parts) or "retrained"

    @property
    def group_size(self) -> int | None:
        """Weights that share a scale: a row of 8 bits, groups below."""
        return None if self.bits in (None, 8) else _GROUP

    @property
    def changes(self) -> bool:
        """Whether it compresses anything: training alone does not."""
        return self != Candidate(distil=self.distil)


def candidates_of(space: Any) -> list[Candidate]:
    """Every candidate of a space, each once, in its order, without those that change nothing.

    space: a mapping of fields of `Candidate` to a value or a list of values, all combinations of which
        are meant; or a list of such mappings.

    Raises ValueError for another shape, unknown fields, values that a `Candidate` refuses, and a space
    in which nothing is compressed.
    """
    grids = space if isinstance(space, list) else [space]
    known = [field.name for field in fields(Candidate)]
    found: dict[Candidate, None] = {}
    for grid in grids:
        if not isinstance(grid, Mapping):
            raise ValueError(
                f"a space is a mapping such as {{layers: [4, 3], bits: [null, 8]}}, or a list of them, "
                f"not {grid!r}."
            )
        if unknown := sorted(str(name) for name in grid if name not in known):
            raise ValueError(f"the space has unknown keys {unknown}; there are {', '.join(known)}.")
        values = [_as_list(name, value) for name, value in grid.items()]
        for settings in itertools.product(*values):
            found[Candidate(**dict(zip(grid, settings, strict=True)))] = None
    chosen = [candidate for candidate in found if candidate.changes]
    if not chosen:
        raise ValueError("the space is empty: no candidate in it changes the model.")
    return chosen


def default_space(depth: int, *, texts: bool) -> dict[str, list[Any]]:
    """Depth, neurons, vocabulary and bits, in steps that differ plainly.

    depth: layers of the model. texts: whether there is a vocabulary to cut.
    """
    depths = sorted({max(1, round(depth * part)) for part in (2 / 3, 1 / 2, 1 / 3)} - {depth})
    return {
        "layers": [None, *reversed(depths)],
        "ffn": [0.0, 0.5],
        "vocabulary": [False, True] if texts else [False],
        "bits": [None, 8, 4],
    }


def _as_list(name: str, value: Any) -> Sequence[Any]:
    if not isinstance(value, list):
        return [value]
    if not value:
        raise ValueError(f"`{name}` has an empty list in the space: give it a value, or leave it out.")
    return value


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
