"""Any collator, which then brings the same rows in tokens of the teacher along."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from hf_compress.distillation.translation.pieces import Pieces
from hf_compress.distillation.translation.spans import NONE, translate

TRANSLATED = "translated"
"""The entry of a batch with `input_ids` and `attention_mask` of the teacher, (rows, their length), the
`spans` of those tokens and `our_spans`, (rows, length); -1 for a token in none."""

logger = logging.getLogger(__name__)


class TranslatingCollator:
    """The batch of `collate`, with `TRANSLATED` as its last entry.

    longest: how many tokens the teacher can read; None: any number.
    Raises ValueError for rows that are packed without padding, and for one that is too long for the
    teacher.
    """

    def __init__(
        self,
        collate: Callable[[Sequence[Any]], Mapping[str, Any]],
        ours: Pieces,
        theirs: Pieces,
        longest: int | None,
    ) -> None:
        self._collate = collate
        self._ours = ours
        self._theirs = theirs
        self._longest = longest
        self._warned = False

    def __call__(self, rows: Sequence[Any]) -> dict[str, Any]:
        batch = self._collate(rows)
        if {"position_ids", "cu_seq_lens_q"} & batch.keys() or batch["input_ids"].ndim != 2:
            raise ValueError(
                "The rows of a batch are packed, and a teacher with another tokenizer would read them "
                "as one text. Turn packing and padding-free batches off."
            )
        ids = batch["input_ids"]
        mask = batch.get("attention_mask", torch.ones_like(ids)).bool()
        found = [
            translate(row[real].tolist(), self._ours, self._theirs)
            for row, real in zip(ids, mask, strict=True)
        ]
        length = max(len(each.ids) for each in found)
        if self._longest is not None and length > self._longest:
            raise ValueError(
                f"A row of {ids.shape[1]} tokens is one of {length} for the teacher, which can read "
                f"{self._longest}. Shorten the rows."
            )
        if not self._warned and all(span == NONE for span in chain(*(row.our_spans for row in found))):
            self._warned = True
            logger.warning(
                "No text of a batch is the same in tokens of the teacher, so it teaches nothing: does "
                "its tokenizer change the text, such as to lower case?"
            )
        our_spans = torch.full_like(ids, NONE)
        our_spans[mask] = torch.tensor([span for row in found for span in row.our_spans])
        return {
            **batch,
            TRANSLATED: {
                "input_ids": _padded([row.ids for row in found], self._padding),
                "attention_mask": _padded([[1] * len(row.ids) for row in found], 0),
                "spans": _padded([row.spans for row in found], NONE),
                "our_spans": our_spans,
            },
        }

    @property
    def _padding(self) -> int:
        return self._theirs.tokenizer.pad_token_id or 0


def _padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    # A row without any text still needs a token.
    tensors = [torch.tensor(list(row) or [value]) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)
