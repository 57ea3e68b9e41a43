"""Which numbers of a batch count, and what each costs: one row per kind of head.

An *item* is what the loss of a head is a mean over: a row for single-label classification, a
(row, label) pair for multi-label, a target for regression, a predicted token for language models.

To add a head: a `Task` that says where its logits and labels are, and a row in `HEADS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from hf_compress.distillation.losses import bernoulli_kl_divergence, kl_divergence, squared_error
from hf_compress.targets import without_adapters

Batch = Mapping[str, Tensor]


class Sums(NamedTuple):
    """Totals over the items of one batch, each a scalar: divide by `items` for the mean."""

    items: Tensor
    task: Tensor
    distillation: Tensor
    agreement: Tensor


@dataclass(frozen=True, kw_only=True)
class Task:
    """How one head turns a batch into items, and what an item costs.

    labels: batch -> (rows, ...); each entry that is not `ignored` is one item;
    logits: model output -> (rows, ...) of the same shape, or (rows, ..., classes);
    loss: the task's own loss, (items, ...) logits and (items,) labels -> (items,);
    divergence: student logits, teacher logits, temperature -> (items,);
    agrees: student logits, teacher logits -> (items,) bool; None where it means nothing.
    """

    name: str
    logits: Callable[[Any], Tensor]
    labels: Callable[[Batch], Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]
    divergence: Callable[[Tensor, Tensor, float], Tensor]
    agrees: Callable[[Tensor, Tensor], Tensor] | None
    ignored: int | None = -100

    def count(self, batch: Batch) -> Tensor:
        """The number of items in `batch`, a scalar, without running a model."""
        return self._counts(self.labels(batch)).sum()

    def sums(
        self,
        student: Any,
        teacher: Any,
        batch: Batch,
        *,
        temperature: float,
        rows: int | None = None,
    ) -> Sums:
        """Totals over the items of the first `rows` rows (None: all), given both models' outputs.

        Entries that do not count are dropped before any arithmetic, so that NaN there reaches neither
        the value nor the gradient. Without any item all totals are 0, still connected to the graph.
        """
        labels = self.labels(batch)[:rows]
        student_logits, teacher_logits = self.logits(student)[:rows], self.logits(teacher)[:rows]
        for who, logits in (("student", student_logits), ("teacher", teacher_logits)):
            if logits.shape[: labels.ndim] != labels.shape:
                raise ValueError(
                    f"{self.name}: the {who} answers with logits of shape {tuple(logits.shape)} to "
                    f"labels of shape {tuple(labels.shape)}. Every label needs its logits; models "
                    "that add positions of their own (prompt tuning) are not supported."
                )
        labels = labels.to(student_logits.device)
        counts = self._counts(labels)
        labels, student_logits = labels[counts], student_logits[counts]
        teacher_logits = teacher_logits.to(student_logits.device)[counts]
        items = counts.sum()
        return Sums(
            items=items,
            task=self.loss(student_logits, labels).sum(),
            distillation=self.divergence(student_logits, teacher_logits, temperature).sum(),
            agreement=(
                torch.zeros_like(items)
                if self.agrees is None
                else self.agrees(student_logits, teacher_logits).sum()
            ),
        )

    def _counts(self, labels: Tensor) -> Tensor:
        if self.ignored is None:
            return torch.ones_like(labels, dtype=torch.bool)
        return labels != self.ignored


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), labels, reduction="none")


def _binary_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits.float(), labels.float(), reduction="none")


def _same_class(student: Tensor, teacher: Tensor) -> Tensor:
    return student.argmax(-1) == teacher.argmax(-1)


def _same_sign(student: Tensor, teacher: Tensor) -> Tensor:
    return (student > 0) == (teacher > 0)


def _kl_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    return kl_divergence(student, teacher, temperature=temperature)


def _bernoulli_kl_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    return bernoulli_kl_divergence(student, teacher, temperature=temperature)


def _squared_error(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    return squared_error(student, teacher)


def _row_by_row(batch: Batch) -> Tensor:
    labels = batch["labels"]
    return labels.reshape(len(labels), -1)  # (rows,) or (rows, labels) -> (rows, labels)


SINGLE_LABEL = Task(
    name="single-label classification",
    logits=lambda output: output.logits,
    labels=lambda batch: batch["labels"].reshape(-1),
    loss=_cross_entropy,
    divergence=_kl_divergence,
    agrees=_same_class,
)

MULTI_LABEL = Task(
    name="multi-label classification",
    logits=lambda output: output.logits,
    labels=_row_by_row,
    loss=_binary_cross_entropy,
    divergence=_bernoulli_kl_divergence,
    agrees=_same_sign,
)

REGRESSION = Task(
    name="regression",
    logits=lambda output: output.logits,
    labels=_row_by_row,
    loss=squared_error,
    divergence=_squared_error,
    agrees=None,
    ignored=None,  # -100 is a target like any other
)

CAUSAL_LM = Task(
    name="causal language modelling",
    # The token at a position is predicted one position earlier.
    logits=lambda output: output.logits[:, :-1],
    labels=lambda batch: batch["labels"][:, 1:],
    loss=_cross_entropy,
    divergence=_kl_divergence,
    agrees=_same_class,
)


def _classification(config: Any, labels: Tensor) -> Task:
    return {
        "single_label_classification": SINGLE_LABEL,
        "multi_label_classification": MULTI_LABEL,
        "regression": REGRESSION,
    }[problem_type_(config, labels)]


def _causal_lm(config: Any, labels: Tensor) -> Task:
    return CAUSAL_LM


@dataclass(frozen=True, kw_only=True)
class Head:
    """A family of models: the class that loads it, the names of its classes, and its task.

    predicts_labels: whether its outputs are the labels named in the config.
    """

    name: str
    auto_class: Any
    class_names: frozenset[str]
    task: Callable[[Any, Tensor], Task]
    predicts_labels: bool


def _names(mapping: Mapping[str, Any], without: Iterable[str] = ()) -> frozenset[str]:
    flat: set[str] = set()
    for names in mapping.values():
        flat.update([names] if isinstance(names, str) else names)
    return frozenset(flat.difference(without))


# transformers lists these as causal LMs, but their own losses do not shift the labels.
_UNSHIFTED = (
    *("BartForCausalLM", "BigBirdPegasusForCausalLM", "BlenderbotForCausalLM"),
    *("BlenderbotSmallForCausalLM", "CpmAntForCausalLM", "MBartForCausalLM", "MarianForCausalLM"),
    *("MusicgenForCausalLM", "MusicgenMelodyForCausalLM", "MvpForCausalLM", "PLBartForCausalLM"),
    *("PegasusForCausalLM", "ProphetNetForCausalLM", "TrOCRForCausalLM", "WhisperForCausalLM"),
    *("XLMWithLMHeadModel", "XLNetLMHeadModel"),
)

HEADS = (
    Head(
        name="sequence classification",
        auto_class=AutoModelForSequenceClassification,
        class_names=_names(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES),
        task=_classification,
        predicts_labels=True,
    ),
    Head(
        name="causal language modelling",
        auto_class=AutoModelForCausalLM,
        class_names=_names(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, without=_UNSHIFTED),
        task=_causal_lm,
        predicts_labels=False,
    ),
)


def head_of(model: nn.Module) -> Head:
    """The head of `model` by its class or a parent class. Raises ValueError where none is known."""
    inner = without_adapters(model)
    for parent in type(inner).__mro__:
        for head in HEADS:
            if parent.__name__ in head.class_names and issubclass(parent, PreTrainedModel):
                return head
    raise ValueError(
        f"Distillation does not know the head of {type(inner).__name__}. Supported: "
        + ", ".join(f"{head.name} ({head.auto_class.__name__})" for head in HEADS)
        + "."
    )


def problem_type_(config: Any, labels: Tensor) -> str:
    """What a sequence classifier is trained for, inferred from its first labels where it is not set.

    Written to the config, as the forward of transformers models does: pipelines read it there.
    """
    if config.problem_type is None:
        if config.num_labels == 1:
            config.problem_type = "regression"
        elif labels.dtype in (torch.long, torch.int):
            config.problem_type = "single_label_classification"
        else:
            config.problem_type = "multi_label_classification"
    return config.problem_type
