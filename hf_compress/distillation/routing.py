"""Several teachers, one for each row: a column of the dataset says which."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_compress.distillation.teachers import Teacher, Teaching

ROUTES = "teacher_of_each_row"
"""The entry of a batch that says it, (rows,): numbers of teachers, from 0."""


@dataclass(frozen=True)
class Routes:
    """column: of the datasets; names: what it holds, of each teacher in their order."""

    column: str
    names: tuple[Hashable, ...]

    def number_of(self, row: Mapping[str, Any]) -> int:
        """Of the teacher of `row`. Raises ValueError where the row does not say it."""
        if self.column not in row:
            raise ValueError(
                f"A row has no column {self.column!r} (`teacher_column`), only {sorted(row)}. Add it "
                "to the dataset. Where it is there, something takes it away before the collator, "
                "as packing does: turn that off, or set remove_unused_columns=False."
            )
        value = row[self.column]
        value = value.item() if isinstance(value, Tensor | np.generic) else value
        self._check([value])
        return self.names.index(value)

    def check(self, datasets: Iterable[Any]) -> None:
        """Raises ValueError where a dataset lacks the column, or names another teacher; of those that
        cannot be looked through `number_of` will. Some may be None, or several by name."""
        for each in datasets:
            for part in each.values() if isinstance(each, dict) else [each]:
                if not isinstance(part, Dataset):
                    continue
                if self.column not in part.column_names:
                    raise ValueError(
                        f"`teacher_column` is {self.column!r}, but a dataset has only the columns "
                        f"{part.column_names}: add it, to the dataset for evaluation too, and keep it "
                        "in `map(remove_columns=...)`."
                    )
                self._check(part.unique(self.column))

    def _check(self, values: Iterable[Hashable]) -> None:
        if unknown := [value for value in values if value not in self.names]:
            raise ValueError(
                f"The column {self.column!r} names {', '.join(map(repr, unknown))}, but the teachers "
                f"are {', '.join(map(repr, self.names))}: pass one for each value, as "
                "teacher={value: model, ...}."
            )


def routes_of(teacher: Any, column: str | None) -> Routes | None:
    """By which `teacher` is asked; None without a `column`, where all are asked about all rows.

    teacher: a dict by what the column holds, or a list, of which it holds the numbers from 0.
    Raises ValueError for a dict without a column, a column without several teachers to choose from, and
    for "cached", since kept answers are in the rows already.
    """
    if column is None:
        if isinstance(teacher, Mapping):
            raise ValueError(
                "`teacher` is a dict: pass `teacher_column` too, the column of the dataset that says "
                f"which of {', '.join(map(repr, teacher))} answers a row. For the mean of all pass a "
                "list."
            )
        return None
    if not isinstance(teacher, Mapping | list | tuple) or not teacher:
        raise ValueError(
            f"`teacher_column` is {column!r}, but there is no choice of teachers: pass "
            "teacher={value of the column: model, ...}."
        )
    each = teacher.values() if isinstance(teacher, Mapping) else teacher
    if any(isinstance(one, str) and one == "cached" for one in each):
        raise ValueError(
            "teacher='cached' must stand alone, without `teacher_column`: the answers are in the rows "
            "already."
        )
    names = list(teacher) if isinstance(teacher, Mapping) else list(range(len(teacher)))
    return Routes(column, tuple(names))


class RoutedTeacher:
    """A `Teacher` made of several, each of which is asked about its own rows alone.

    Raises ValueError for inputs that do not come row by row, as packed ones.
    """

    def __init__(self, teachers: Sequence[Teacher]) -> None:
        self._teachers = tuple(teachers)

    @torch.no_grad()
    def __call__(self, features: Mapping[str, Any]) -> Any:
        routes: Tensor = features[ROUTES]
        given = {name: value for name, value in features.items() if name != ROUTES}
        for name, value in given.items():
            if isinstance(value, Tensor) and value.shape[:1] != routes.shape:
                raise ValueError(
                    f"The batch has `{name}` of shape {tuple(value.shape)} for {len(routes)} rows with "
                    "teachers of their own: leave out `teacher_column`, or turn off packing and "
                    "padding-free batches."
                )
        order: list[Tensor] = []
        parts: dict[str, list[Tensor]] = {}
        for number, teacher in enumerate(self._teachers):
            (rows,) = (routes == number).nonzero(as_tuple=True)
            if not len(rows):
                continue
            own = {n: v[rows] if isinstance(v, Tensor) else v for n, v in given.items()}
            order.append(rows)
            for name, value in teacher(own).items():
                if name.endswith("logits"):
                    parts.setdefault(name, []).append(value.to(routes.device))
        back = torch.cat(order).argsort()
        return SimpleNamespace(**{name: torch.cat(values)[back] for name, values in parts.items()})


class RoutedCollator:
    """The batch of `collate`, which does not see the column, with `ROUTES` as its last entry."""

    def __init__(self, collate: Callable[[list[Any]], Any], routes: Routes) -> None:
        self._collate = collate
        self._routes = routes

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        numbers = [self._routes.number_of(row) for row in rows]
        column = self._routes.column
        plain = [{name: row[name] for name in row if name != column} for row in rows]
        return {**self._collate(plain), ROUTES: torch.tensor(numbers)}


def routed(teaching: Teaching, routes: Routes, collate: Any, *, sharded: bool) -> Teaching:
    """`teaching` by several models, each of which answers its rows alone.

    sharded: whether models are cut into shards. Raises NotImplementedError where they are.
    """
    if sharded or any(_is_sharded(model) for model in teaching.models):
        raise NotImplementedError(
            "`teacher_column` with models that are cut into shards: a process that has no row for a "
            "teacher would not take part in gathering its weights. Use DDP."
        )
    return replace(
        teaching,
        asked=[RoutedTeacher(teaching.asked)],
        collator=RoutedCollator(collate, routes),
        inside=None,
    )


def _is_sharded(model: nn.Module) -> bool:
    return any(isinstance(each, DTensor) for each in model.parameters())
