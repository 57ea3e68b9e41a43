"""What tells two rows, and two teachers, apart."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from hashlib import blake2b
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForTokenClassification

from hf_compress.distillation.tasks.heads import HEADS, Head

_LABELS_EACH_TOKEN = (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForTokenClassification,
)


def head_called(name: str) -> Head:
    """Raises ValueError for a name that no head has."""
    for head in HEADS:
        if head.name == name:
            return head
    raise ValueError(f"There is no head for {name!r}, only for {', '.join(h.name for h in HEADS)}.")


def answers_tokens(head: Head) -> bool:
    """Whether models with this head answer each token, and not each row."""
    return head.auto_class in _LABELS_EACH_TOKEN or head.makes_decoder_inputs


def row_keys(batch: Mapping[str, Any], head: Head, main_input: str) -> list[str]:
    """One key for each row: of what the teacher is asked about, whatever the padding around it.

    That is the input `main_input`, which tokens have a label where tokens have one, and the labels
    where these are inputs too. Other labels may change.
    Raises ValueError for a batch without `main_input`.
    """
    if main_input not in batch:
        raise ValueError(
            f"The batch has no {main_input!r}, only {sorted(batch)}: rows are known again by it."
        )
    inputs, mask = batch[main_input], batch.get("attention_mask")
    labels = batch.get("labels")
    parts = [_real(inputs, mask)]
    if head.auto_class in _LABELS_EACH_TOKEN and labels is not None:
        parts.append(_real(labels != -100, mask))
    if head.makes_decoder_inputs and labels is not None:
        parts.append(_real(labels, labels != -100))
    return [_digest(row) for row in zip(*parts, strict=True)]


def fingerprint(model: nn.Module) -> str:
    """Of all weights, with their names and dtypes."""
    seen = blake2b(digest_size=8)
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        seen.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        seen.update(_bytes(tensor))
    return seen.hexdigest()


def _real(values: Tensor, mask: Tensor | None) -> list[Tensor]:
    """Each row without what `mask` says is padding."""
    if mask is None or mask.ndim < 2 or values.shape[: mask.ndim] != mask.shape:
        return list(values)
    return [row[shown != 0] for row, shown in zip(values, mask, strict=True)]


def _digest(parts: Iterable[Tensor]) -> str:
    seen = blake2b(digest_size=8)
    for part in parts:
        part = part.float() if part.is_floating_point() else part.long()
        seen.update(f"{tuple(part.shape)}".encode())
        seen.update(_bytes(part))
    return seen.hexdigest()


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
