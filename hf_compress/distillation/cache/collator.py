"""Any collator, which then brings the teacher's answers to its rows along."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hf_compress.distillation.cache.answers import joined
from hf_compress.distillation.cache.asking import Collate
from hf_compress.distillation.cache.cells import OUTPUTS, STATES, Cell, Origin, from_bytes
from hf_compress.distillation.cache.keys import head_called, row_keys
from hf_compress.distillation.cache.states import joined_states


class CachedCollator:
    """The batch of `collate`, with the answers to its rows as its last entries.

    origins: that all answers of a column must have. main_input: as in `row_keys`.
    Raises ValueError for a row without answers, with others', or whose input is not the one that the
    teacher was asked about.
    """

    def __init__(self, collate: Collate, origins: Mapping[str, Origin], main_input: str) -> None:
        self._collate = collate
        # The head itself cannot be sent to workers.
        self._head_name = origins[OUTPUTS].head
        self._origins = {column: origin.to_json() for column, origin in origins.items()}
        self._main_input = main_input

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        head = head_called(self._head_name)
        # Evaluation needs no states.
        columns = [column for column in self._origins if column == OUTPUTS or column in rows[0]]
        cells = {column: self._cells(column, rows) for column in columns}
        plain = [{k: v for k, v in row.items() if k not in (OUTPUTS, STATES)} for row in rows]
        batch = dict(self._collate(plain))
        keys = row_keys(batch, head, self._main_input)
        for column, own in cells.items():
            if keys != [cell.key for cell in own]:
                raise ValueError(
                    f"The {self._main_input} of a row, or which of its tokens have a label, is not "
                    "what the teacher was asked about. Use the tokenizer, truncation and collator of "
                    "`precompute_teacher`, or call it again with those of this training."
                )
            answers = [cell.answers for cell in own]
            batch[column] = joined(answers, head) if column == OUTPUTS else joined_states(answers)
        return batch

    def _cells(self, column: str, rows: Sequence[Mapping[str, Any]]) -> list[Cell]:
        if any(column not in row for row in rows):
            raise ValueError(
                f"teacher='cached', but a row has no column {column!r}: pass the dataset that "
                "`precompute_teacher` returned, for evaluation too."
            )
        cells = [from_bytes(row[column]) for row in rows]
        for cell in cells:
            if cell.origin != self._origins[column]:
                raise ValueError(
                    f"Rows have answers of several teachers, or kept in several ways: {cell.origin} is "
                    f"not {self._origins[column]}. Precompute all of them in one way."
                )
        return cells
