"""Whether an exported model still says what the torch model says."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from transformers import PreTrainedModel

from hf_compress.metrics.functions import accuracy, f1, perplexity
from hf_compress.publishing.scores import task_of

Batch = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Parity:
    """Two models on the same batches.

    rows, predictions: how many were compared; a causal language model makes one for each token.
    agreement: fraction of the predictions whose most probable class is the same. max_difference: the
    largest between two logits. torch, exported: scores of each, where the batches had labels: accuracy
    and macro F1 of classes of rows, perplexity of a language model.
    """

    rows: int
    predictions: int
    agreement: float
    max_difference: float
    torch: dict[str, float]
    exported: dict[str, float]


class _Scores:
    """Of logits as they come."""

    def __init__(self, task: str | None) -> None:
        self._task = task
        self._chosen: list[int] = []
        self._wanted: list[int] = []
        self._loss, self._tokens = 0.0, 0

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """logits: (rows, classes), or (rows, length, vocabulary)."""
        if self._task == "classes":
            self._chosen += logits.argmax(-1).tolist()
            self._wanted += labels.tolist()
        elif self._task == "tokens":
            targets = labels[:, 1:].flatten()
            predicted = logits[:, :-1].flatten(0, 1).float()
            self._loss += float(cross_entropy(predicted, targets, reduction="sum"))
            self._tokens += int((targets != -100).sum())

    def all(self) -> dict[str, float]:
        if self._chosen:
            return {
                "accuracy": accuracy(self._chosen, self._wanted),
                "f1": f1(self._chosen, self._wanted),
            }
        return {"perplexity": perplexity(self._loss / self._tokens)} if self._tokens else {}


@torch.no_grad()
def compare(model: PreTrainedModel, exported: Callable[..., Any], batches: Iterable[Batch]) -> Parity:
    """batches: inputs of `model`, perhaps with `labels`; each is put through both.

    Raises ValueError without any batch, and where the outputs are no finite logits of one shape.
    """
    model.eval()
    task = task_of(model)
    scores = _Scores(task), _Scores(task)
    rows, predictions, same, most = 0, 0, 0, 0.0
    for batch in batches:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        outputs = model(**inputs), exported(**inputs)
        if any("logits" not in output for output in outputs):
            raise ValueError(f"a {type(model).__name__} has no logits, by which exports are compared.")
        ours, theirs = (output["logits"].float() for output in outputs)
        if ours.shape != theirs.shape or not theirs.isfinite().all():
            raise ValueError(
                f"the export gives {tuple(theirs.shape)} logits, the model {tuple(ours.shape)}, or "
                "they are not finite: it is of no use. Try other `bits`, or another format."
            )
        if "labels" in batch:
            for score, logits in zip(scores, (ours, theirs), strict=True):
                score.add(logits, batch["labels"])
        if ours.dim() == 3 and "attention_mask" in inputs:
            ours, theirs = (logits[inputs["attention_mask"].bool()] for logits in (ours, theirs))
        rows += len(next(iter(inputs.values())))
        predictions += ours[..., 0].numel()
        same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        most = max(most, float((ours - theirs).abs().max()))
    if not rows:
        raise ValueError("there are no rows to compare on.")
    return Parity(
        rows=rows,
        predictions=predictions,
        agreement=same / predictions,
        max_difference=most,
        torch=scores[0].all(),
        exported=scores[1].all(),
    )


def single_rows(batches: Iterable[Batch], length: int, padding: int) -> Iterator[dict[str, Tensor]]:
    """Each row of `batches` alone, texts padded to `length` at their end: what a program takes whose
    shapes are fixed. padding: the token; labels of tokens get -100, and masks 0."""
    fill = {"input_ids": padding, "labels": -100}
    for batch in batches:
        for number in range(len(next(iter(batch.values())))):
            row = {name: value[number : number + 1] for name, value in batch.items()}
            yield {
                name: pad(value, (0, length - value.shape[1]), value=fill.get(name, 0))
                if value.dim() == 2 and not value.is_floating_point()
                else value
                for name, value in row.items()
            }
