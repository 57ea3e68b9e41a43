"""A teacher, and how it is asked about rows of a dataset."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import send_to_device
from datasets import Dataset
from torch import nn

from hf_compress.distillation.cache.answers import Keeping, cut
from hf_compress.distillation.cache.cells import OUTPUTS, Origin, to_bytes
from hf_compress.distillation.cache.keys import answers_tokens, row_keys
from hf_compress.distillation.tasks.heads import Head
from hf_compress.distillation.teacher import accepted_inputs
from hf_compress.targets import without_adapters

Collate = Callable[[list[Any]], Mapping[str, Any]]


class Asking:
    """collate: rows -> batch, of those `columns` of the rows alone."""

    def __init__(
        self,
        *,
        model: nn.Module,
        head: Head,
        collate: Collate,
        columns: Sequence[str],
        keeping: Keeping,
        origin: Origin,
    ) -> None:
        self.model = model
        self._inner: Any = without_adapters(model)
        self._head = head
        self._collate = collate
        self._columns = columns
        self._keeping = keeping
        self._origin = origin.to_json()

    def identity(self, dataset: Dataset, rows: int) -> str:
        """What another result would come of. Raises ValueError where a second look at the first `rows`
        rows shows others."""
        first, again = (self._keys(self._batch(dataset, range(rows))) for _ in range(2))
        if first != again:
            raise ValueError(
                "The collator gives the same rows other inputs or labels each time, so the teacher "
                "cannot be asked before. Draw once, with `dataset.map`, and let the collator only pad."
            )
        return f"{self._origin} {self._keeping} {dataset._fingerprint} {first}"

    @torch.no_grad()
    def answers(self, dataset: Dataset, rows: Sequence[int]) -> dict[str, list[bytes]]:
        """The column, for those rows of `dataset`."""
        batch = self._batch(dataset, rows)
        keys = self._keys(batch)
        if len(keys) != len(rows):
            raise ValueError(
                f"The collator made {len(keys)} rows out of {len(rows)}, but answers belong to single "
                "rows. Pack in the dataset, and let the collator only pad."
            )
        placed = send_to_device(dict(batch), next(self.model.parameters()).device)
        features = self._head.inputs(self._inner, placed)
        output = self.model(**accepted_inputs(self.model, {**features, "use_cache": False}))
        task = self._head.task(self._inner, placed) if answers_tokens(self._head) else None
        cells = cut(output, placed, task=task, keys=keys, keeping=self._keeping)
        return {
            OUTPUTS: [to_bytes(cell, key, self._origin) for cell, key in zip(cells, keys, strict=True)]
        }

    def _batch(self, dataset: Dataset, rows: Sequence[int]) -> Mapping[str, Any]:
        chosen = (dataset[row] for row in rows)
        batch = self._collate([{name: row[name] for name in self._columns} for row in chosen])
        if answers_tokens(self._head) and "labels" not in batch:
            raise ValueError(
                f"The batch has no `labels`, only {sorted(batch)}: they say which tokens count. Give "
                "`data_collator`, the one of the training."
            )
        return batch

    def _keys(self, batch: Mapping[str, Any]) -> list[str]:
        return row_keys(batch, self._head, self._inner.main_input_name)
