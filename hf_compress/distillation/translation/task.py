"""Causal language modelling with a teacher that has another tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_compress.distillation.divergences import Divergence
from hf_compress.distillation.losses import precise
from hf_compress.distillation.tasks.labelled import CAUSAL_LM, IGNORED
from hf_compress.distillation.tasks.task import Batch, Sums
from hf_compress.distillation.translation.collator import TRANSLATED
from hf_compress.distillation.translation.distances import (
    between_likelihoods,
    likelihoods,
    sorted_distance,
)


@dataclass(frozen=True)
class TranslatedCausalLM:
    """A `Task` whose items are labelled tokens, each of which costs the distance of its span.

    across: "likelihood" compares how probable both models find the text of a span (papers/2503.20083);
    "uld" the sorted distributions of the token at its beginning, where both know the same text
    (papers/2402.12030).

    A span counts where all of its tokens have a label, and both models something before it: the others,
    and tokens in none, cost 0.
    """

    across: str
    name: str = "causal language modelling across tokenizers"
    agreement: bool = False

    def count(self, batch: Batch) -> Tensor:
        return CAUSAL_LM.count(batch)

    def sums(
        self,
        student: Any,
        teachers: Sequence[Any],
        batch: Batch,
        *,
        divergence: Divergence,
        weights: Sequence[float] = (1.0,),
        rows: int | None = None,
    ) -> Sums:
        (teacher,) = teachers
        labels = CAUSAL_LM.labels(batch)[:rows]
        counted = labels != IGNORED
        logits, _ = CAUSAL_LM.items_of(student, {"labels": batch["labels"][:rows]})
        tokens = labels[counted].to(logits.device)
        translated = {
            name: value[:rows].to(logits.device) for name, value in _translated(batch).items()
        }
        distances = self._distances(
            divergence, logits, tokens, counted.to(logits.device), teacher, translated
        )
        items = counted.sum().to(logits.device)
        return Sums(
            items=items,
            task=CAUSAL_LM.answer.loss(logits, tokens).sum(),
            distillation=distances.sum(),
            agreement=torch.zeros_like(items),
        )

    def _distances(
        self,
        divergence: Divergence,
        logits: Tensor,
        tokens: Tensor,
        counted: Tensor,
        teacher: Any,
        translated: Mapping[str, Tensor],
    ) -> Tensor:
        """Of each span that counts, times the number of its tokens: (spans,)."""
        spans, their_spans = _numbered(translated["our_spans"], translated["spans"])
        number = 1 + int(torch.cat([spans.flatten(), their_spans.flatten()]).max())
        size, their_size = _sizes(spans, number), _sizes(their_spans, number)
        of_items, of_theirs = spans[:, 1:][counted], their_spans[:, 1:]
        counts = (size > 0) & (size == _sizes(of_items, number))
        counts &= (their_size > 0) & (their_size == _sizes(of_theirs, number))
        # Only what counts is computed with; its spans are numbered anew, in the same order.
        renumbered = torch.where(counts, counts.cumsum(0) - 1, -1)
        renumbered = torch.cat([renumbered, renumbered.new_tensor([-1])])  # what -1 finds
        of_items, of_theirs = renumbered[of_items], renumbered[of_theirs]
        mine, other = of_items >= 0, of_theirs >= 0
        ours = precise(logits[mine]) / divergence.temperature
        theirs = CAUSAL_LM.logits(teacher)[: len(other)].to(logits.device)[other]
        theirs = precise(theirs) / divergence.taught_temperature
        of_items, of_theirs = of_items[mine], of_theirs[other]
        if self.across == "uld":
            each = divergence.scale(1) * sorted_distance(
                F.log_softmax(ours[_firsts(of_items)], dim=-1),
                F.log_softmax(theirs[_firsts(of_theirs)], dim=-1),
            )
        else:
            spans_that_count = int(counts.sum())
            their_tokens = translated["input_ids"][:, 1:][other]
            each = between_likelihoods(
                divergence,
                likelihoods(ours, tokens[mine], of_items, spans_that_count),
                likelihoods(theirs, their_tokens, of_theirs, spans_that_count),
            )
        return size[counts] * each


def _translated(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    return batch[TRANSLATED]


def _numbered(ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    """Spans (rows, length) that are counted through all rows; -1 stays."""
    width = 1 + max(int(ours.max()), int(theirs.max()))
    start = width * torch.arange(len(ours), device=ours.device)[:, None]
    return tuple(torch.where(spans < 0, -1, spans + start) for spans in (ours, theirs))  # type: ignore[return-value]


def _sizes(spans: Tensor, number: int) -> Tensor:
    return torch.bincount(spans[spans >= 0], minlength=number)


def _firsts(spans: Tensor) -> Tensor:
    """Whether each is the first of its span. (tokens,), rising -> bool (tokens,)."""
    return torch.cat([spans.new_ones(len(spans[:1])), spans.diff()]) != 0
