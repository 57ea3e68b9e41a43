"""A teacher's answers to a batch, cut into rows, and those of other rows put together again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCTC

from hf_compress.devices import host
from hf_compress.distillation.cache.cells import Origin
from hf_compress.distillation.cache.keys import answers_tokens
from hf_compress.distillation.shortlist import Shortlist, draw, most_probable
from hf_compress.distillation.tasks.heads import Head
from hf_compress.distillation.tasks.items import ItemAnswers
from hf_compress.distillation.tasks.labelled import Labelled
from hf_compress.distillation.tasks.task import Batch, Task

COUNTS = "counts"
"""The entry of joined answers that says how many items each row has, where answers are of items."""
_LOGITS = ("logits", "start_logits", "end_logits")


@dataclass(frozen=True, kw_only=True)
class Keeping:
    """What is kept of answers: see `precompute_teacher`. classes: None for all of them."""

    what: str
    size: int | None
    temperature: float | None
    dtype: torch.dtype | None
    classes: int | None
    seed: int


def cut(
    output: Any, batch: Batch, *, task: Task | None, keys: Sequence[str], keeping: Keeping
) -> list[dict[str, Tensor]]:
    """For each row of `batch` what is kept of the answers in `output`, on CPU.

    task: where labels belong to tokens, of whose answers those to items alone are kept; else None.
    keys: of the rows, which decide what is drawn, so that it does not depend on the other rows.
    """
    if task is None:
        logits = {name: output[name] for name in _LOGITS if name in output}
        return [
            {name: _converted(value[row], keeping.dtype) for name, value in logits.items()}
            for row in range(len(keys))
        ]
    assert isinstance(task, Labelled)
    values, counts = task.items_of(output, batch)
    rows = values[..., : keeping.classes].split(counts.tolist())
    return [_kept(items, key, keeping) for items, key in zip(rows, keys, strict=True)]


def _kept(items: Tensor, key: str, keeping: Keeping) -> dict[str, Tensor]:
    if keeping.what == "logits":
        return {"logits": _converted(items, keeping.dtype)}
    assert keeping.size is not None
    assert keeping.temperature is not None
    if keeping.what == "topk":
        shortlist = most_probable(items, keeping.size, keeping.temperature)
    else:
        generator = torch.Generator(items.device).manual_seed(int(key, 16) ^ keeping.seed)
        shortlist = draw(items, keeping.size, keeping.temperature, generator)
    dtype = keeping.dtype or torch.float16
    return {
        "ids": shortlist.ids.cpu(),
        "logs": _converted(shortlist.logs, dtype),
        "rest": _converted(shortlist.rest, dtype),
    }


def _converted(values: Tensor, dtype: torch.dtype | None) -> Tensor:
    return values.detach().to(host(), dtype)


def joined(rows: Sequence[dict[str, Tensor]], head: Head) -> dict[str, Tensor]:
    """The answers of a batch of `rows`, as tensors that a batch can hold.

    Raises ValueError where rows do not go together.
    """
    if answers_tokens(head):
        together = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
        first = next(iter(rows[0]))
        return {**together, COUNTS: torch.tensor([len(row[first]) for row in rows])}
    ragged = head.auto_class is AutoModelForCTC
    return {name: _stacked([row[name] for row in rows], ragged=ragged) for name in rows[0]}


def _stacked(values: Sequence[Tensor], *, ragged: bool) -> Tensor:
    if ragged:
        return torch.nn.utils.rnn.pad_sequence(list(values), batch_first=True)
    shapes = {tuple(value.shape) for value in values}
    if len(shapes) > 1:
        raise ValueError(
            f"The teacher's answers to the rows of a batch have the shapes {sorted(shapes)}: they are "
            "of whole inputs, so pad all rows to one length in the dataset, and precompute it again."
        )
    return torch.stack(list(values))


def restored(answers: dict[str, Tensor], origin: Origin) -> Any:
    """What a `Task` takes for a teacher's output."""
    counts = answers.get(COUNTS)
    if counts is None:
        return SimpleNamespace(**answers)
    if origin.temperature is None:
        return ItemAnswers(answers["logits"], counts)
    assert origin.classes is not None
    shortlist = Shortlist(
        ids=answers["ids"],
        logs=answers["logs"],
        rest=answers["rest"],
        classes=origin.classes,
        temperature=origin.temperature,
        drawn=origin.what == "sampled",
    )
    return ItemAnswers(shortlist, counts)
