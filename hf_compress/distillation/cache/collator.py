"""Any collator, which then brings the teacher's answers to its rows along."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hf_compress.distillation.cache.answers import joined
from hf_compress.distillation.cache.asking import Collate
from hf_compress.distillation.cache.cells import OUTPUTS, Origin, from_bytes
from hf_compress.distillation.cache.keys import head_called, row_keys


class CachedCollator:
    """The batch of `collate`, with the answers to its rows as its last entry.

    origin: that all answers must have. main_input: as in `row_keys`.
    Raises ValueError for a row without answers, with others', or whose input is not the one that the
    teacher was asked about.
    """

    def __init__(self, collate: Collate, origin: Origin, main_input: str) -> None:
        self._collate = collate
        # The head itself cannot be sent to workers.
        self._head_name = origin.head
        self._origin = origin.to_json()
        self._main_input = main_input

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        if any(OUTPUTS not in row for row in rows):
            raise ValueError(
                f"teacher='cached', but a row has no column {OUTPUTS!r}: pass the dataset that "
                "`precompute_teacher` returned, for evaluation too."
            )
        head = head_called(self._head_name)
        cells = [from_bytes(row[OUTPUTS]) for row in rows]
        batch = self._collate([{k: v for k, v in row.items() if k != OUTPUTS} for row in rows])
        for cell in cells:
            if cell.origin != self._origin:
                raise ValueError(
                    f"Rows have answers of several teachers, or kept in several ways: {cell.origin} is "
                    f"not {self._origin}. Precompute all of them in one way."
                )
        keys = row_keys(batch, head, self._main_input)
        if keys != [cell.key for cell in cells]:
            raise ValueError(
                f"The {self._main_input} of a row, or which of its tokens have a label, is not what "
                "the teacher was asked about. Use the tokenizer, truncation and collator of "
                "`precompute_teacher`, or call it again with those of this training."
            )
        return {**batch, OUTPUTS: joined([cell.answers for cell in cells], head)}
