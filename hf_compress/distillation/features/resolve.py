"""From what a match says to the places in two given models."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import replace

from torch import nn
from transformers import PreTrainedModel

from hf_compress.distillation.features.layer_maps import Pairs, layer_pairs
from hf_compress.distillation.features.match import KINDS, SCORED, Match
from hf_compress.distillation.features.recorder import Feature
from hf_compress.distillation.features.terms import Term
from hf_compress.distillation.stacks import Stack, find_stacks


def resolve(match: Match, student: PreTrainedModel, teacher: PreTrainedModel) -> list[Term]:
    """The terms of `match`, one for each stack. Raises ValueError where it does not fit the models."""
    stacks, others = find_stacks(student), find_stacks(teacher)
    if stacks.keys() != others.keys():
        raise ValueError(
            f"the student has {', '.join(stacks)}, the teacher {', '.join(others)}: inner parts of "
            "models of different build cannot be compared."
        )
    name = match.name or match.what
    if match.what not in KINDS or match.what == "pooled":
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
    if match.what in SCORED:
        return Term(name, match, ours.name, _features("attention", ours, theirs, pairs))
    causal = any(vars(part).get("is_causal") for part in ours.layers.modules())
    if match.tokens == "first" and causal:
        raise ValueError(
            f"match {name!r}: the first token of {ours.path} sees only itself, so it tells nothing of "
            "the row. Pass tokens='last' or 'mean'."
        )
    widths = (ours.config.hidden_size, theirs.config.hidden_size)
    if widths[0] != widths[1] and not match.projection:
        raise ValueError(
            f"match {name!r}: the student's vectors have width {widths[0]}, the teacher's {widths[1]}. "
            "Pass projection=True, which learns a matrix between them."
        )
    everything = [Feature(match.what, ours.name, number) for number in range(len(ours.layers))]
    return Term(
        name=name,
        match=match,
        stack=ours.name,
        pairs=_features(match.what, ours, theirs, pairs),
        widths=widths if widths[0] != widths[1] else None,
        candidates=everything if match.layers == "closest" else (),
    )


def _features(kind: str, ours: Stack, theirs: Stack, pairs: Pairs) -> list[tuple[Feature, Feature]]:
    return [(Feature(kind, ours.name, i), Feature(kind, theirs.name, j)) for i, j in pairs]


def _module_term(
    name: str,
    match: Match,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    stacks: Mapping[str, Stack],
) -> Term:
    if match.what == "pooled":
        named = pooler_of(student), pooler_of(teacher)
        match = replace(match, tokens=None)
    else:
        named = match.what, match.teacher_module or match.what
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


def pooler_of(model: PreTrainedModel) -> str:
    """The path of the module whose output is the pooled one. Raises ValueError where there is none."""
    pooler = dict(model.base_model.named_children()).get("pooler")
    for path, module in model.named_modules():
        if module is pooler:
            return path
    raise ValueError(
        f"{type(model).__name__} has no pooler. Compare 'hidden' with tokens='first' (or 'last', "
        "'mean') and layers='final' instead, or name the module that pools."
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
