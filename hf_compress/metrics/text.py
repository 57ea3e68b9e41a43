"""Scores of texts as plain functions of strings."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise_answer(text: str) -> str:
    """As SQuAD compares answers: lower case, without punctuation and articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Fraction in [0, 1] of answers that equal one of the accepted ones after `normalise_answer`
    (1606.05250).

    references: the accepted answers of each question; none for one without an answer (1806.03822), to
    which only an empty prediction is right.

    Raises ValueError for different lengths, no questions, and references that are strings.
    """
    _check(predictions, references)
    right = [
        any(normalise_answer(given) == normalise_answer(answer) for answer in answers or [""])
        for given, answers in zip(predictions, references, strict=True)
    ]
    return sum(right) / len(right)


def answer_f1(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Mean in [0, 1] of the F1 of the words of each answer, with the accepted one that it is nearest
    to; arguments and errors as of `exact_match`."""
    _check(predictions, references)
    scores = [
        max(_word_f1(given, answer) for answer in answers or [""])
        for given, answers in zip(predictions, references, strict=True)
    ]
    return sum(scores) / len(scores)


def word_error_rate(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Words to insert, delete or replace in all `predictions`, over the words of all `references`: 0 is
    the best, and more than 1 possible. White space parts the words; nothing is normalised.

    Raises ValueError for different lengths and for references without any word.
    """
    words = [text.split() for text in references]
    if len(predictions) != len(words) or not any(words):
        raise ValueError(
            f"{len(predictions)} `predictions` and {len(words)} `references` must be as many, and the "
            "references must have a word among them."
        )
    errors = sum(
        edit_distance(given.split(), wanted) for given, wanted in zip(predictions, words, strict=True)
    )
    return errors / sum(map(len, words))


def edit_distance(first: Sequence[str], second: Sequence[str]) -> int:
    """The fewest insertions, deletions and replacements from one to the other (Levenshtein)."""
    row = list(range(len(second) + 1))
    for place, item in enumerate(first, start=1):
        corner, row[0] = row[0], place
        for column, other in enumerate(second, start=1):
            replaced = corner + (item != other)
            corner = row[column]
            row[column] = min(replaced, corner + 1, row[column - 1] + 1)
    return row[-1]


def _word_f1(given: str, answer: str) -> float:
    found, wanted = normalise_answer(given).split(), normalise_answer(answer).split()
    if not found or not wanted:
        return float(found == wanted)
    common = (Counter(found) & Counter(wanted)).total()
    return 2 * common / (len(found) + len(wanted))


def _check(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if not predictions or len(predictions) != len(references):
        raise ValueError(
            f"{len(predictions)} `predictions` and {len(references)} `references` must be as many, at "
            "least one."
        )
    if any(isinstance(answers, str) for answers in references):
        raise ValueError(
            "`references` must be lists of accepted answers, one list for each question: [['Paris']]."
        )
