"""Scores as plain functions of arrays and numbers."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray


def accuracy(predictions: ArrayLike, references: ArrayLike) -> float:
    """Fraction in [0, 1] of class numbers, any shape, that are equal.

    With the choices of another model as `references` it is the agreement with that model.

    Raises ValueError for different shapes, as logits and labels have, or nothing to compare.
    """
    found: NDArray = np.asarray(predictions)
    wanted: NDArray = np.asarray(references)
    if found.shape != wanted.shape or not found.size:
        raise ValueError(
            f"`predictions` {found.shape} and `references` {wanted.shape} must be class numbers of "
            "one shape, at least one of them. Of logits take `.argmax(-1)`."
        )
    return float((found == wanted).mean())


def perplexity(loss: float) -> float:
    """exp of the mean negative log-likelihood per token, in nats; infinity where that overflows."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
