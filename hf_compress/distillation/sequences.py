"""What a teacher writes, as the data of its student (papers/1606.07947)."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import send_to_device
from datasets import Dataset
from torch import nn
from transformers import AutoModelForCausalLM

from hf_compress.distillation.sampling import check_writes, rewritten
from hf_compress.distillation.tasks.heads import head_of
from hf_compress.distillation.tasks.labelled import IGNORED


def teacher_sequences(
    dataset: Dataset,
    teacher: nn.Module,
    data_collator: Callable[[list[dict[str, Any]]], Mapping[str, Any]],
    *,
    batch_size: int = 8,
    temperature: float = 0.0,
    beams: int = 1,
    seed: int = 0,
) -> Dataset:
    """`dataset` with what `teacher` writes in the place of the labelled tokens: sequence-level
    distillation, on which any Trainer can train the student.

    Rows are those of the training, tokenized, with prompts that have no label (see `rewritten`);
    data_collator is the one of the training. Columns of a batch alone stay: `input_ids`,
    `attention_mask` and `labels` of a causal model, without padding.

    temperature: 0 writes the most probable text, by `beams` beams; above it the text is drawn, from
    `seed`. The random states are afterwards as they were.

    Raises NotImplementedError for a teacher that is no causal or sequence-to-sequence language model,
    ValueError for several `beams` beside a temperature, and as `rewritten`.
    """
    head = head_of(teacher)
    check_writes(head)
    causal = head.auto_class is AutoModelForCausalLM
    if temperature and beams > 1:
        raise ValueError(
            f"beams={beams} look for the most probable text, but temperature={temperature} draws one: "
            "leave one of them out."
        )
    device = next(teacher.parameters()).device

    def write(columns: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        batch = send_to_device(dict(data_collator(rows)), device)
        written = rewritten(teacher, batch, temperature=temperature, beams=beams)
        return _unpadded(written, causal=causal)

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return dataset.with_format(None).map(
            write,
            batched=True,
            batch_size=batch_size,
            remove_columns=dataset.column_names,
            new_fingerprint=uuid.uuid4().hex[:16],  # else the teacher's weights would be hashed
            desc="The teacher writes",
        )


def _unpadded(batch: Mapping[str, Any], *, causal: bool) -> dict[str, list[Any]]:
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    labels = mask if causal else batch["labels"] != IGNORED
    return {
        name: [
            row[r].tolist() for row, r in zip(values, labels if name == "labels" else mask, strict=True)
        ]
        for name, values in batch.items()
    }
