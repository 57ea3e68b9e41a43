"""The loss of a language model from its hidden states: logits exist for a few items at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_compress.distillation import slopes
from hf_compress.distillation.divergences import Divergence
from hf_compress.distillation.losses import precise
from hf_compress.distillation.output_layer import OutputLayer
from hf_compress.distillation.shortlist import Shortlist, same_class
from hf_compress.distillation.tasks.task import Sums

Taught = tuple[Tensor, OutputLayer] | Tensor | Shortlist
"""A teacher's hidden states, and what makes logits of them; or its answers to the items alone, (items,
classes), where these were kept."""


def chunked_sums(
    hidden: Tensor,
    layer: OutputLayer,
    teachers: Sequence[Taught],
    labels: Tensor,
    counts: Tensor,
    *,
    divergence: Divergence,
    alpha: float,
    chunk_size: int,
    weights: Sequence[float] = (1.0,),
) -> Sums:
    """Cross-entropy with the labels and divergence from the teachers, summed over the items.

    hidden: (..., width), what `layer` turns into logits; teachers: the same of each, of any width and
    with at most as many classes, or the answers that were kept; labels: (...), in [0, classes) where
    `counts`, bool (...), says that they are items; chunk_size: how many items have logits at one time;
    weights: of the teachers, which add up to 1.

    The gradient of (1 - alpha) * task + alpha * distillation is computed in the same pass, so that
    nothing is projected twice: mix the two sums by this same `alpha`, and use neither alone. Until the
    backward pass it takes the memory of the weight once more, in fp32 or better; beside that about
    6 * chunk_size * classes numbers. There are no gradients of gradients.

    Raises ValueError where shapes do not fit together, or `chunk_size` is not above 0.
    """
    if chunk_size < 1:
        raise ValueError(f"`chunk_size` is {chunk_size}: at least 1 item is projected at a time.")
    theirs = [("teacher", each[0]) for each in teachers if isinstance(each, tuple)]
    for who, states in (("student", hidden), *theirs):
        if not states.shape[:-1] == labels.shape == counts.shape:
            raise ValueError(
                f"The {who}'s hidden states are {tuple(states.shape)}, labels {tuple(labels.shape)}, "
                f"`counts` {tuple(counts.shape)}: all dimensions but the width must be the same."
            )
    items = _Items(
        layer=layer.under_autocast(),
        teachers=[_of_items(each, counts) for each in teachers],
        labels=labels[counts].to(hidden.device),
        divergence=divergence,
        weights=weights,
        alpha=alpha,
        chunk_size=chunk_size,
    )
    learnt = hidden[counts.to(hidden.device)], layer.weight, layer.bias
    task, distillation, agreement = _Loss.apply(*learnt, items, torch.is_grad_enabled())
    return Sums(counts.sum().to(hidden.device), task, distillation, agreement)


@dataclass(frozen=True)
class _Projected:
    """A teacher's answers to the items, made of their hidden states, (items, width), when they are
    asked for."""

    states: Tensor
    layer: OutputLayer

    def ready(self) -> _Projected:
        return replace(self, layer=self.layer.ready())

    def __getitem__(self, part: slice) -> Tensor:
        return self.layer.logits(self.states[part])


@dataclass(frozen=True)
class _Kept:
    """A teacher's answers to the items that are there already."""

    answers: Tensor | Shortlist

    def ready(self) -> _Kept:
        return self

    def __getitem__(self, part: slice) -> Tensor | Shortlist:
        answers = self.answers[part]
        # A copy, since logits are overwritten.
        return answers if isinstance(answers, Shortlist) else precise(answers).clone()


_Answers = _Projected | _Kept


def _of_items(taught: Taught, counts: Tensor) -> _Answers:
    if not isinstance(taught, tuple):
        return _Kept(taught)
    states, layer = taught
    return _Projected(states.detach()[counts.to(states.device)], layer.under_autocast())


@dataclass(frozen=True, kw_only=True)
class _Items:
    """The loss as a function of the student's hidden states and weights; see `chunked_sums`.

    teachers, labels: of the items alone.
    """

    layer: OutputLayer
    teachers: Sequence[_Answers]
    labels: Tensor
    divergence: Divergence
    weights: Sequence[float]
    alpha: float
    chunk_size: int

    def run(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: Sequence[bool]
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Task, distillation and agreement, (3,); and the gradients to `hidden` (items, width), to
        `weight` and `bias`, each where it is `wanted`."""
        layer = replace(self.layer, weight=weight, bias=bias).ready()
        teachers = [each.ready() for each in self.teachers]
        dtype = torch.promote_types(layer.weight.dtype, torch.float32)
        gradients = [
            torch.zeros_like(each, dtype=dtype) if want and each is not None else None
            for each, want in zip((hidden, weight, bias), wanted, strict=True)
        ]
        sums = torch.zeros(3, dtype=dtype, device=hidden.device)
        for start in range(0, len(hidden), self.chunk_size):
            part = slice(start, start + self.chunk_size)
            self._add_(sums, gradients, part, hidden, layer, teachers)
        return sums, gradients

    def _add_(
        self,
        sums: Tensor,
        gradients: Sequence[Tensor | None],
        part: slice,
        hidden: Tensor,
        layer: OutputLayer,
        teachers: Sequence[_Answers],
    ) -> None:
        to_hidden, to_weight, to_bias = gradients
        states = hidden[part].to(layer.weight.dtype)
        logits = layer.logits(states)
        theirs = [each[part].to(logits.device) for each in teachers]
        values, slope = self._losses(logits, theirs, self.labels[part])
        sums += values
        slope = layer.slope(slope, logits)
        if to_bias is not None:
            to_bias += slope.sum(0)
        slope = slope.to(states.dtype)
        if to_hidden is not None:
            to_hidden[part] = slope @ layer.weight
        if to_weight is not None and to_weight.dtype == slope.dtype:
            to_weight.addmm_(slope.T, states)
        elif to_weight is not None:
            to_weight += slope.T @ states

    def _losses(
        self, logits: Tensor, all_theirs: Sequence[Any], labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Task, distillation and agreement, (3,); and how the mixture of the first two changes with
        `logits`, (items, classes)."""
        theirs = self.divergence.merged_classes(all_theirs, self.weights)
        # Classes behind the last of the teacher are padding of the vocabulary.
        compared = logits[:, : theirs.shape[-1]]
        agreement = same_class(compared, theirs).sum()
        distillation, taught = slopes.between_classes(self.divergence, compared, theirs)
        del theirs
        task, slope = slopes.cross_entropy(logits, labels)
        # What weighs 0 is left out, not multiplied by 0: it must not bring in NaN.
        slope = slope.zero_() if self.alpha == 1 else slope.mul_(1 - self.alpha)
        if self.alpha > 0:
            slope[:, : taught.shape[-1]].add_(taught, alpha=self.alpha)
        return torch.stack([task.sum(), distillation.sum(), agreement.to(task.dtype)]), slope


class _Loss(torch.autograd.Function):
    """Task, distillation and agreement. Gradients are made in the forward pass, where the logits are
    at hand, and given away in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        items: _Items,
        learns: bool,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(hidden, weight, bias)
        ctx.items = items
        ctx.wanted = [learns and needed for needed in ctx.needs_input_grad[:3]]
        with torch.autocast(hidden.device.type, enabled=False):
            sums, ctx.gradients = items.run(hidden, weight, bias, ctx.wanted)
        task, distillation, agreement = (each.clone() for each in sums)
        ctx.mark_non_differentiable(agreement)
        return task, distillation, agreement

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_task: Tensor, by_distillation: Tensor, _: Tensor) -> tuple[Any, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:  # a second time over a graph that was retained
            _, gradients = ctx.items.run(*ctx.saved_tensors, ctx.wanted)
        # From a mixture of both come 1 - alpha and alpha times the same. In place, and kept by nobody
        # else, since the gradient of the weight is large.
        by_mixture = by_task + by_distillation
        scaled = [
            None if each is None else each.mul_(by_mixture).to(source.dtype)
            for each, source in zip(gradients, ctx.saved_tensors, strict=True)
        ]
        return *scaled, None, None
