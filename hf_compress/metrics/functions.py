"""Scores as plain functions of arrays and numbers."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Average = Literal["binary", "macro", "micro", "weighted"]
AVERAGES = ("binary", "macro", "micro", "weighted")


def accuracy(predictions: ArrayLike, references: ArrayLike) -> float:
    """Fraction in [0, 1] of class numbers, any shape, that are equal.

    Raises ValueError for different shapes, as logits and labels have, or nothing to compare.
    """
    found, wanted = _classes(predictions, references)
    return float((found == wanted).mean())


def agreement(student: ArrayLike, teacher: ArrayLike) -> float:
    """Fraction in [0, 1] of the choices of a teacher (its most probable class, of each row or token)
    that the student makes too; any shape. Errors as of `accuracy`."""
    return accuracy(student, teacher)


def f1(
    predictions: ArrayLike, references: ArrayLike, *, average: Average = "macro", pos_label: int = 1
) -> float:
    """F1 in [0, 1]: the harmonic mean of precision and recall, of class numbers of any shape.

    average: "macro", the mean over the classes that occur, so that a rare one counts as much as a
        frequent one; "weighted", the mean by how often each occurs in `references`; "micro", of all
        decisions together; "binary", that of the class `pos_label` alone.

    A class that is neither predicted nor there has an F1 of 0. Raises ValueError as `accuracy`, and for
    another `average`.
    """
    if average not in AVERAGES:
        raise ValueError(f"`average` is {average!r}; allowed are {', '.join(map(repr, AVERAGES))}.")
    found, wanted = _classes(predictions, references)
    classes = np.array([pos_label]) if average == "binary" else np.union1d(found, wanted)
    right = np.array([((found == c) & (wanted == c)).sum() for c in classes])
    # Precision's and recall's denominators together.
    mentioned = np.array([(found == c).sum() + (wanted == c).sum() for c in classes])
    if average == "micro":
        right, mentioned = right.sum(keepdims=True), mentioned.sum(keepdims=True)
    scores = 2 * right / np.maximum(mentioned, 1)
    if average == "weighted":
        return float(np.average(scores, weights=[(wanted == c).sum() for c in classes]))
    return float(scores.mean())


def matthews(predictions: ArrayLike, references: ArrayLike) -> float:
    """Matthews' correlation in [-1, 1] of class numbers, any shape and number of classes; 0 where
    either side has only one (Gorodkin, doi.org/10.1016/j.compbiolchem.2004.09.006).

    Raises ValueError as `accuracy`.
    """
    found, wanted = _classes(predictions, references)
    classes = np.union1d(found, wanted)
    chosen = np.array([(found == c).mean() for c in classes])
    true = np.array([(wanted == c).mean() for c in classes])
    spread = (1 - chosen @ chosen) * (1 - true @ true)
    if len(np.unique(found)) == 1 or len(np.unique(wanted)) == 1:
        return 0.0
    return float(((found == wanted).mean() - chosen @ true) / math.sqrt(spread))


def perplexity(loss: float) -> float:
    """exp of the mean negative log-likelihood per token, in nats; infinity where that overflows."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def mean_loss(losses: ArrayLike, tokens: ArrayLike) -> float:
    """The mean over all tokens, of means over parts: `losses` of each part, and its `tokens` (n,).

    The same however the tokens are cut into parts. Raises ValueError for different lengths, negative
    counts, and no tokens at all.
    """
    means, counts = np.asarray(losses, dtype=float), np.asarray(tokens, dtype=float)
    if means.shape != counts.shape or (counts < 0).any() or not counts.sum():
        raise ValueError(
            f"`losses` {means.shape} and `tokens` {counts.shape} must be of one length, with at least "
            "one token in all and no negative count."
        )
    # A part without tokens has no mean: 0 / 0.
    present = counts > 0
    return float(np.average(means[present], weights=counts[present]))


def _classes(predictions: ArrayLike, references: ArrayLike) -> tuple[NDArray, NDArray]:
    found: NDArray = np.asarray(predictions)
    wanted: NDArray = np.asarray(references)
    if found.shape != wanted.shape or not found.size:
        raise ValueError(
            f"`predictions` {found.shape} and `references` {wanted.shape} must be class numbers of "
            "one shape, at least one of them. Of logits take `.argmax(-1)`."
        )
    return found.reshape(-1), wanted.reshape(-1)
