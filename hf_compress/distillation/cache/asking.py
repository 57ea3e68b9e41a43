"""A teacher, and how it is asked about rows of a dataset."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import send_to_device
from datasets import Dataset
from torch import Tensor, nn

from hf_compress.distillation.cache.answers import Keeping, cut
from hf_compress.distillation.cache.cells import OUTPUTS, STATES, Origin, to_bytes
from hf_compress.distillation.cache.keys import answers_tokens, row_keys
from hf_compress.distillation.cache.states import cut_states
from hf_compress.distillation.features.recorder import Feature, Recorder
from hf_compress.distillation.tasks.heads import Head
from hf_compress.distillation.teacher import accepted_inputs
from hf_compress.targets import without_adapters

Collate = Callable[[list[Any]], Mapping[str, Any]]


class Asking:
    """collate: rows -> batch, of those `columns` of the rows alone. features: what is kept of the
    inside of the model, in place of its outputs."""

    def __init__(
        self,
        *,
        model: nn.Module,
        head: Head,
        collate: Collate,
        columns: Sequence[str],
        keeping: Keeping,
        origin: Origin,
        features: Collection[Feature] = (),
    ) -> None:
        self.model = model
        self._inner: Any = without_adapters(model)
        self._head = head
        self._collate = collate
        self._columns = columns
        self._keeping = keeping
        self._origin = origin.to_json()
        self._features = features
        self.column = STATES if features else OUTPUTS

    def identity(self, dataset: Dataset, rows: int) -> str:
        """What another result would come of. Raises ValueError where a second look at the first `rows`
        rows shows others."""
        first, again = (self._keys(self._batch(dataset, range(rows))) for _ in range(2))
        if first != again:
            raise ValueError(
                "The collator gives the same rows other inputs or labels each time, so the teacher "
                "cannot be asked before. Draw once, with `dataset.map`, and let the collator only pad."
            )
        return f"{self._origin} {self._keeping} {self._features} {dataset._fingerprint} {first}"

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
        asked = accepted_inputs(self.model, {**features, "use_cache": False})
        if self._features:
            cells = cut_states(self._inside(asked), placed, len(keys), self._keeping.dtype)
        else:
            task = self._head.task(self._inner, placed) if answers_tokens(self._head) else None
            cells = cut(self.model(**asked), placed, task=task, keys=keys, keeping=self._keeping)
        pairs = zip(cells, keys, strict=True)
        return {self.column: [to_bytes(cell, key, self._origin) for cell, key in pairs]}

    def _inside(self, asked: Mapping[str, Any]) -> dict[Feature, Tensor]:
        recorder = Recorder(self._inner, self._features)
        try:
            recorder.start()
            self.model(**asked)
            taken = recorder.take(learns=False)
        finally:
            recorder.remove()
        return {feature: value for feature, value in taken.items() if isinstance(value, Tensor)}

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
