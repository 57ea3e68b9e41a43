"""A match in two given models: the features that it needs, and what a batch of them costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_compress.distillation.features.attention import Attended
from hf_compress.distillation.features.distances import DISTANCES
from hf_compress.distillation.features.items import token_mask, vectors
from hf_compress.distillation.features.match import Match
from hf_compress.distillation.features.recorder import Feature, Value
from hf_compress.distillation.features.relations import attention_costs, relation_costs
from hf_compress.distillation.losses import precise

Values = Mapping[Feature, Value]
Pair = tuple[Feature, Feature]


@dataclass(frozen=True)
class Term:
    """One match in one stack: `name` is its own among all, and each pair is (student's, teacher's).

    widths: of the student's and the teacher's vectors where a projection is between them.
    candidates: all of the student's layers, where the pairs are only a start.
    """

    name: str
    match: Match
    stack: str
    pairs: Sequence[Pair]
    widths: tuple[int, int] | None = None
    candidates: Sequence[Feature] = ()

    def total(
        self,
        student: Values,
        teacher: Values,
        batch: Mapping[str, Any],
        projections: Mapping[str, Tensor],
        pairs: Sequence[Pair] | None = None,
    ) -> Tensor:
        """Sum of the distances of all items of `batch`, a scalar, averaged over `pairs` (by default its
        own), of which each has the projection of its number."""
        mask = token_mask(batch, self.stack)
        totals = []
        for number, (ours, theirs) in enumerate(self.pairs if pairs is None else pairs):
            projection = projections.get(f"{self.name}.{number}")
            costs, weight = self._costs(student[ours], teacher[theirs], mask, projection)
            totals.append(weight * costs.sum())
        return torch.stack(totals).mean()

    @torch.no_grad()
    def distances(
        self,
        student: Values,
        teacher: Values,
        batch: Mapping[str, Any],
        projections: Mapping[str, Tensor],
    ) -> Tensor:
        """Sums (pairs, candidates) over the items of `batch`: of the teacher's side of each pair to
        each candidate."""
        mask = token_mask(batch, self.stack)
        rows = []
        for number, (_, theirs) in enumerate(self.pairs):
            projection = projections.get(f"{self.name}.{number}")
            costs = [
                self._costs(student[ours], teacher[theirs], mask, projection)[0].sum()
                for ours in self.candidates
            ]
            rows.append(torch.stack(costs))
        return torch.stack(rows)

    def _costs(
        self, student: Value, teacher: Value, mask: Tensor | None, projection: Tensor | None
    ) -> tuple[Tensor, float]:
        """(items,), and what each weighs."""
        what, distance = self.match.what, self.match.distance_name
        if isinstance(student, Attended) and isinstance(teacher, Attended):
            _check_shapes(self.name, student.query, teacher.query, mask, positions=2)
            if what == "attention":
                return attention_costs(student, teacher, mask, distance=distance)
            return relation_costs(student, teacher, mask, what=what, heads=self.match.relation_heads)
        assert isinstance(student, Tensor)
        assert isinstance(teacher, Tensor)
        tokens = self.match.tokens
        _check_shapes(self.name, student, teacher, mask, positions=None if tokens is None else 1)
        ours, weight = vectors(student, mask, tokens)
        theirs, _ = vectors(teacher.to(student.device), mask, tokens)
        ours, theirs = precise(ours), precise(theirs)
        if projection is not None:
            ours = ours @ projection.T
        if ours.shape != theirs.shape:
            raise ValueError(
                f"match {self.name!r}: the student's vectors have width {ours.shape[-1]}, the "
                f"teacher's {theirs.shape[-1]}. Pass projection=True."
            )
        return DISTANCES[distance](ours, theirs), weight


def _check_shapes(
    name: str, student: Tensor, teacher: Tensor, mask: Tensor | None, *, positions: int | None
) -> None:
    """Raises ValueError where rows or positions, which are dimension `positions`, are not the same."""
    expected = {
        None: "(rows, width)",
        1: "(rows, positions, width)",
        2: "(rows, heads, positions, size)",
    }
    dims = [0] if positions is None else [0, positions]
    ours, theirs = (tuple(side.shape[dim] for dim in dims) for side in (student, teacher))
    fits = positions is None or mask is None or tuple(mask.shape) == ours
    if student.ndim != expected[positions].count(",") + 1 or ours != theirs or not fits:
        raise ValueError(
            f"match {name!r}: the student gives shape {tuple(student.shape)}, the teacher "
            f"{tuple(teacher.shape)}, and the mask of tokens has "
            f"{None if mask is None else tuple(mask.shape)}. Expected is {expected[positions]}, of the "
            "same rows and positions; for an output without positions pass tokens=None."
        )
