"""Heads that answer to each label with logits of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_compress.distillation.divergences import Divergence
from hf_compress.distillation.losses import squared_error
from hf_compress.distillation.shortlist import Shortlist, distance, same_class
from hf_compress.distillation.tasks.items import ItemAnswers
from hf_compress.distillation.tasks.task import Batch, Sums

IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What an item is answered with: one of several classes, yes or no, or a number.

    loss: the task's own loss, (items, ...) logits and (items,) labels -> (items,);
    distance: divergence, student logits, teacher logits (of a class also a shortlist) -> (items,);
    merge: divergence, logits of several teachers, their weights -> logits as of one;
    agrees: student logits, teacher logits -> (items,) bool; None where it means nothing.
    """

    loss: Callable[[Tensor, Tensor], Tensor]
    distance: Callable[[Divergence, Tensor, Any], Tensor]
    merge: Callable[[Divergence, Sequence[Any], Sequence[float]], Any]
    agrees: Callable[[Tensor, Any], Tensor] | None


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """A `Task` whose items are the labels that are not `ignored`.

    labels: batch -> (rows, ...); each entry is one item;
    logits: model output -> (rows, ...) of the same shape, or (rows, ..., classes).
    """

    name: str
    logits: Callable[[Any], Tensor]
    labels: Callable[[Batch], Tensor]
    answer: Answer
    ignored: int | None = IGNORED

    @property
    def agreement(self) -> bool:
        return self.answer.agrees is not None

    def count(self, batch: Batch) -> Tensor:
        return self._counts(self.labels(batch)).sum()

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
        labels = self.labels(batch)[:rows]
        counts = self._counts(labels)
        ours = self._counted("student", student, counts)
        all_theirs = [self._taught(each, counts).to(ours.device) for each in teachers]
        theirs = self.answer.merge(divergence, all_theirs, weights)
        # Classes behind the last of the teacher are padding of the vocabulary.
        compared = ours[..., : theirs.shape[-1]]
        labels, items = labels[counts].to(ours.device), counts.sum().to(ours.device)
        agrees = self.answer.agrees
        return Sums(
            items=items,
            task=self.answer.loss(ours, labels).sum(),
            distillation=self.answer.distance(divergence, compared, theirs).sum(),
            agreement=torch.zeros_like(items) if agrees is None else agrees(compared, theirs).sum(),
        )

    def items_of(self, output: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """The logits (items, ...) of all items of `batch`, and (rows,) how many each row has."""
        counts = self._counts(self.labels(batch))
        return self._counted("teacher", output, counts), counts.flatten(1).sum(1)

    def _counts(self, labels: Tensor) -> Tensor:
        if self.ignored is None:
            return torch.ones_like(labels, dtype=torch.bool)
        return labels != self.ignored

    def _taught(self, output: Any, counts: Tensor) -> Tensor | Shortlist:
        if isinstance(output, ItemAnswers):
            return output.to_items(counts, self.name)
        return self._counted("teacher", output, counts)

    def _counted(self, who: str, output: Any, counts: Tensor) -> Tensor:
        logits = self.logits(output)[: len(counts)]
        if logits.shape[: counts.ndim] != counts.shape:
            raise ValueError(
                f"{self.name}: the {who} answers with logits of shape {tuple(logits.shape)} to labels "
                f"of shape {tuple(counts.shape)}. Every label needs its logits; models that add "
                "positions of their own (prompt tuning) are not supported."
            )
        return logits[counts.to(logits.device)]


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), labels, reduction="none")


def _binary_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits.float(), labels.float(), reduction="none")


def _same_sign(student: Tensor, teacher: Tensor) -> Tensor:
    return (student > 0) == (teacher > 0)


CLASS = Answer(
    loss=_cross_entropy,
    distance=distance,
    merge=Divergence.merged_classes,
    agrees=same_class,
)
YES_OR_NO = Answer(
    loss=_binary_cross_entropy,
    distance=Divergence.between_labels,
    merge=Divergence.merged_labels,
    agrees=_same_sign,
)
NUMBER = Answer(
    loss=squared_error,
    distance=Divergence.between_numbers,
    merge=Divergence.merged_numbers,
    agrees=None,
)


def _logits(output: Any) -> Tensor:
    return output.logits


def _labels(batch: Batch) -> Tensor:
    return batch["labels"]


def _one_a_row(batch: Batch) -> Tensor:
    return batch["labels"].reshape(-1)


def _row_by_row(batch: Batch) -> Tensor:
    labels = batch["labels"]
    return labels.reshape(len(labels), -1)  # (rows,) or (rows, labels) -> (rows, labels)


SINGLE_LABEL = Labelled(
    name="single-label classification", logits=_logits, labels=_one_a_row, answer=CLASS
)
MULTI_LABEL = Labelled(
    name="multi-label classification", logits=_logits, labels=_row_by_row, answer=YES_OR_NO
)
REGRESSION = Labelled(
    name="regression",
    logits=_logits,
    labels=_row_by_row,
    answer=NUMBER,
    ignored=None,  # -100 is a target like any other
)
CHOICES = Labelled(name="multiple choice", logits=_logits, labels=_one_a_row, answer=CLASS)
TOKENS = Labelled(name="token classification", logits=_logits, labels=_labels, answer=CLASS)
MASKED_LM = Labelled(name="masked language modelling", logits=_logits, labels=_labels, answer=CLASS)
SEQ2SEQ = Labelled(
    name="sequence-to-sequence language modelling", logits=_logits, labels=_labels, answer=CLASS
)
CAUSAL_LM = Labelled(
    name="causal language modelling",
    # The token at a position is predicted one position earlier.
    logits=lambda output: output.logits[:, :-1],
    labels=lambda batch: batch["labels"][:, 1:],
    answer=CLASS,
)
