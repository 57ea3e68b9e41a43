"""Which vectors of a feature count: tokens that the attention mask shows, or one for each row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def token_mask(batch: Mapping[str, Any], stack: str) -> Tensor | None:
    """Bool (rows, positions): the tokens of `batch` that are not padding, as the layers of `stack` see
    them; None where nothing says so. The choices of multiple choice are rows.

    A "decoder" has the positions of its own mask, or else of the labels.
    """
    if stack == "decoder":
        if "decoder_attention_mask" in batch:
            return batch["decoder_attention_mask"] != 0
        labels = batch.get("labels")
        return labels != -100 if labels is not None and labels.ndim == 2 else None
    mask, ids = batch.get("attention_mask"), batch.get("input_ids")
    if mask is None or (mask.ndim != 2 and (ids is None or mask.shape != ids.shape)):
        return None
    return mask.flatten(0, -2) != 0


def count_items(batch: Mapping[str, Any], stack: str, tokens: str | None) -> Tensor | int:
    """The number of items of `batch`, without running a model: tokens, or rows where each row gives
    one vector or nothing tells padding from tokens."""
    mask = token_mask(batch, stack) if tokens == "all" else None
    if mask is not None:
        return mask.sum()
    if "input_ids" in batch:
        return batch["input_ids"].shape[:-1].numel()
    return len(next(value for value in batch.values() if isinstance(value, Tensor)))


def vectors(feature: Tensor, mask: Tensor | None, tokens: str | None) -> tuple[Tensor, float]:
    """The vectors (items, ...) of `feature` that count, and the weight of each.

    feature: (rows, positions, ...), or (rows, ...) where `tokens` is None. What does not count is
    dropped before any arithmetic, so that NaN there reaches neither the value nor the gradient.
    Without a mask all positions of a row together weigh 1.
    """
    if tokens is None:
        return feature, 1.0
    if tokens == "all":
        if mask is None:
            return feature.flatten(0, 1), 1.0 / feature.shape[1]
        return feature[mask], 1.0
    shown = torch.ones(feature.shape[:2], dtype=torch.bool, device=feature.device)
    shown = shown if mask is None else mask
    if tokens == "mean":
        total = feature.masked_fill(~shown[..., None], 0.0).sum(1)
        return total / shown.sum(1, keepdim=True).clamp(min=1), 1.0
    order = torch.arange(shown.shape[1], device=shown.device)
    position = torch.where(shown, order if tokens == "last" else -order, -len(order)).argmax(1)
    return feature[torch.arange(len(feature), device=feature.device), position], 1.0
