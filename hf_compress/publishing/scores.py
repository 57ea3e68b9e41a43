"""The scores of a card, found anew in a loop of its own: not by the Trainer that found them first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_compress.distillation.tasks.heads import head_of
from hf_compress.metrics.functions import accuracy, f1, matthews, mean_loss, perplexity

Batch = Mapping[str, Tensor]
_TASKS = {
    "sequence classification": "classes",
    "image classification": "classes",
    "audio classification": "classes",
    "causal language modelling": "tokens",
}


def task_of(model: PreTrainedModel) -> str | None:
    """Whether "classes" of rows or "tokens" are predicted; None where nothing is scored here."""
    try:
        return _TASKS.get(head_of(model).name)
    except ValueError:
        return None


@torch.no_grad()
def scores_of(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    *,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> dict[str, float]:
    """What a classifier of rows, or a causal language model, reaches on `batches` with `labels`.

    A classifier gets `accuracy`, macro `f1`, `f1_weighted`, of two classes also the `f1_binary` of the
    second, and `matthews_correlation`. Both get `loss`, the mean over
    the rows of the mean of their batch, as Trainer evaluates, and `loss_task`, the mean over all rows
    or tokens; a language model `perplexity`, exp of the latter.

    context: entered around each forward, such as autocast. The model is put in eval mode.

    Raises ValueError for a model of another kind, and without any batch.
    """
    task = task_of(model)
    if task is None:
        raise ValueError(
            f"a {type(model).__name__} cannot be evaluated here. Models of {', '.join(_TASKS)} can."
        )
    if task == "classes" and model.config.problem_type not in (None, "single_label_classification"):
        raise ValueError(f"{model.config.problem_type} cannot be evaluated here: one class a row can.")
    model.eval()
    losses, rows, items = [], [], []
    chosen, wanted = [], []
    for batch in batches:
        on_device = {name: value.to(model.device) for name, value in batch.items()}
        with context():
            outputs = model(**on_device)
        labels = on_device["labels"]
        losses.append(float(outputs.loss))
        rows.append(len(labels))
        # A causal model predicts all but the first token.
        items.append(len(labels) if task == "classes" else int((labels[:, 1:] != -100).sum()))
        if task == "classes":
            chosen += outputs.logits.argmax(-1).tolist()
            wanted += labels.tolist()
    if not rows:
        raise ValueError("there are no rows to evaluate on.")
    scores = {"loss": mean_loss(losses, rows), "loss_task": mean_loss(losses, items)}
    if task == "tokens":
        return scores | {"perplexity": perplexity(scores["loss_task"])}
    if model.config.num_labels == 2:
        scores["f1_binary"] = f1(chosen, wanted, average="binary")
    return scores | {
        "accuracy": accuracy(chosen, wanted),
        "f1": f1(chosen, wanted, average="macro"),
        "f1_weighted": f1(chosen, wanted, average="weighted"),
        "matthews_correlation": matthews(chosen, wanted),
    }
