"""Whether student and teacher mean the same by the same number, and how to make them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

Classes = list[int] | slice
"""Which of a teacher's classes, in the order of the student's."""


def label_classes(ours: Mapping[int, str], theirs: Mapping[int, str]) -> Classes | None:
    """The teacher's class for each class of the student, by name; None where they are as they are.

    Upper and lower case are the same, and LABEL_0, LABEL_1, ... say nothing about what they stand for.
    Raises ValueError where the names are others.
    """
    mine, other = ([str(names[i]).casefold() for i in sorted(names)] for names in (ours, theirs))
    if mine == other or any(
        all(re.fullmatch(r"label_\d+", name) for name in names) for names in (mine, other)
    ):
        return None
    if sorted(mine) != sorted(other) or len(set(mine)) < len(mine):
        raise ValueError(
            f"The teacher has labels with other names: student {dict(ours)}, teacher {dict(theirs)}. "
            "Give the student the teacher's id2label and label2id, and encode the labels of the data "
            "the same way."
        )
    return [other.index(name) for name in mine]


def vocabulary_classes(
    ours: int | None, theirs: int | None, processing: Any, path: str
) -> Classes | None:
    """The tokens that both know, where one vocabulary is padded further; None for all of them.

    ours, theirs: the sizes, None for models without one. processing: the student's tokenizer or
    processor, if any; path: where the teacher came from, and with it its tokenizer, which is compared
    token by token, if there is one.

    Raises ValueError where one number is two tokens, or different sizes cannot be compared.
    """
    tokenizer = getattr(processing, "tokenizer", processing)
    mine = _tokens(tokenizer) if isinstance(tokenizer, PreTrainedTokenizerBase) else None
    other = _tokens_at(path) if mine is not None and path else None
    if mine is None or other is None or ours is None or theirs is None:
        if ours == theirs:
            return None
        lacking = "the student's `processing_class`" if mine is None else "the teacher's path"
        raise ValueError(
            f"The student's vocabulary has {ours} entries, the teacher's {theirs}, and without "
            f"{lacking} there is no tokenizer to compare, to tell padding from other tokens. Pass "
            "both, or choose a teacher with the same vocabulary."
        )
    clash = next((i for i in sorted(mine.keys() & other.keys()) if mine[i] != other[i]), None)
    if clash is not None:
        raise ValueError(
            f"The teacher has another tokenizer: token {clash} is {mine[clash]!r} for the student, "
            f"{other[clash]!r} for the teacher. Choose a teacher with the student's tokenizer."
        )
    if max(mine) >= theirs:
        raise ValueError(
            f"The student's tokenizer has {max(mine) + 1} tokens, of which the teacher knows only "
            f"{theirs}. Choose a teacher with the student's tokenizer."
        )
    return None if ours == theirs else slice(0, 1 + min(max(mine), max(other)))


def _tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    return {number: token for token, number in tokenizer.get_vocab().items()}


def _tokens_at(path: str) -> dict[int, str] | None:
    try:
        return _tokens(AutoTokenizer.from_pretrained(path))
    except (OSError, ValueError):  # it was saved without one
        return None
