"""A match in two given models: the features that it needs, and what a batch of them costs."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_compress.distillation.features.distances import DISTANCES
from hf_compress.distillation.features.items import token_mask, vectors
from hf_compress.distillation.features.layer_maps import layer_pairs
from hf_compress.distillation.features.match import KINDS, Match
from hf_compress.distillation.features.recorder import Feature
from hf_compress.distillation.stacks import Stack, find_stacks

Values = Mapping[Feature, Tensor]


@dataclass(frozen=True)
class Term:
    """One match in one stack: `name` is its own among all, and each pair is (student's, teacher's).

    widths: of the student's and the teacher's vectors, for each pair that has a projection.
    """

    name: str
    match: Match
    stack: str
    pairs: Sequence[tuple[Feature, Feature]]
    widths: tuple[int, int] | None

    def total(
        self,
        student: Values,
        teacher: Values,
        batch: Mapping[str, Any],
        projections: Mapping[str, Tensor],
    ) -> Tensor:
        """Sum of the distances of all items of `batch`, a scalar, averaged over the pairs."""
        totals = []
        for number, (ours, theirs) in enumerate(self.pairs):
            learner, example = student[ours], teacher[theirs].to(student[ours].device)
            mask = token_mask(batch, self.stack)
            _check_shapes(self, learner, example, mask)
            learner, weight = vectors(learner, mask, self.match.tokens)
            example, _ = vectors(example, mask, self.match.tokens)
            learner, example = _precise(learner), _precise(example)
            projection = projections.get(f"{self.name}.{number}")
            if projection is not None:
                learner = learner @ projection.T
            if learner.shape != example.shape:
                raise ValueError(
                    f"match {self.name!r}: the student's vectors have width {learner.shape[-1]}, the "
                    f"teacher's {example.shape[-1]}. Pass projection=True."
                )
            distance = DISTANCES[self.match.distance_name]
            totals.append(weight * distance(learner, example).sum())
        return torch.stack(totals).mean()


def resolve(match: Match, student: PreTrainedModel, teacher: PreTrainedModel) -> list[Term]:
    """The terms of `match`, one for each stack. Raises ValueError where it does not fit the models."""
    stacks, others = find_stacks(student), find_stacks(teacher)
    if stacks.keys() != others.keys():
        raise ValueError(
            f"the student has {', '.join(stacks)}, the teacher {', '.join(others)}: inner parts of "
            "models of different build cannot be compared."
        )
    name = match.name or match.what
    if match.what not in KINDS:
        return [_module_term(name, match, student, teacher, stacks)]
    chosen = list(stacks) if match.stack is None else [match.stack]
    if unknown := [place for place in chosen if place not in stacks]:
        raise ValueError(
            f"match {name!r}: there is no stack {unknown[0]!r} in {type(student).__name__}, only "
            f"{', '.join(stacks)}."
        )
    return [
        _stack_term(
            name if len(chosen) == 1 else f"{name}_{place}", match, stacks[place], others[place]
        )
        for place in chosen
    ]


def _stack_term(name: str, match: Match, ours: Stack, theirs: Stack) -> Term:
    pairs = [(0, 0)]
    if match.what != "embeddings":
        pairs = layer_pairs(match.layers, len(ours.layers), len(theirs.layers))
    widths = (ours.config.hidden_size, theirs.config.hidden_size)
    if widths[0] != widths[1] and not match.projection:
        raise ValueError(
            f"match {name!r}: the student's vectors have width {widths[0]}, the teacher's {widths[1]}. "
            "Pass projection=True, which learns a matrix between them."
        )
    features = [
        (Feature(match.what, ours.name, i), Feature(match.what, theirs.name, j)) for i, j in pairs
    ]
    return Term(name, match, ours.name, features, widths if widths[0] != widths[1] else None)


def _module_term(
    name: str,
    match: Match,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    stacks: Mapping[str, Stack],
) -> Term:
    named = (match.what, match.teacher_module or match.what)
    for who, model, path in zip(("student", "teacher"), (student, teacher), named, strict=True):
        modules = dict(model.named_modules())
        if path not in modules:
            near = ", ".join(difflib.get_close_matches(path, [*KINDS, *modules], n=3))
            raise ValueError(
                f"the {who} has no module {path!r}; near names: {near or 'none'}. What can be compared "
                f"beside modules: {', '.join(KINDS)}."
            )
    mine, other = named
    inside = [stack.name for stack in stacks.values() if mine.startswith(stack.owner)]
    widths = None
    if match.projection:
        widths = _width(student.get_submodule(mine)), _width(teacher.get_submodule(other))
    return Term(
        name=name,
        match=match,
        stack=match.stack or (inside[0] if inside else "layers"),
        pairs=[(Feature("module", mine), Feature("module", other))],
        widths=widths if widths and widths[0] != widths[1] else None,
    )


def _width(module: nn.Module) -> int:
    """Of the output of `module`: that of the last part in it whose weights tell."""
    width = 0
    for part in module.modules():
        for field in ("out_features", "nf", "embedding_dim"):
            if field in vars(part):
                width = vars(part)[field]
                break
        else:
            weight = dict(part.named_parameters(recurse=False)).get("weight")
            if weight is not None and weight.ndim == 1:
                width = len(weight)
    return width


def _check_shapes(term: Term, student: Tensor, teacher: Tensor, mask: Tensor | None) -> None:
    leading = 1 if term.match.tokens is None else 2
    fits = mask is None or leading == 1 or mask.shape == student.shape[:2]
    if student.ndim != leading + 1 or student.shape[:-1] != teacher.shape[:-1] or not fits:
        expected = "(rows, width)" if leading == 1 else "(rows, positions, width)"
        raise ValueError(
            f"match {term.name!r}: the student gives shape {tuple(student.shape)}, the teacher "
            f"{tuple(teacher.shape)}, and the mask has {None if mask is None else tuple(mask.shape)}. "
            f"Both must be {expected} of the same rows and positions; for an output without positions "
            "pass tokens=None."
        )


def _precise(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
