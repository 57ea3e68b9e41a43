"""By which rows and scores `choose` judges: some choose, others report and choose nothing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from datasets import Dataset
from transformers import EvalPrediction

from hf_compress.choosing.search import Metric
from hf_compress.cli.arguments import CompressArguments
from hf_compress.cli.data import first_rows, held_out, label_names, load_all, load_splits
from hf_compress.metrics import functions

SCORES = {"accuracy": functions.accuracy, "f1": functions.f1, "matthews": functions.matthews}


@dataclass(frozen=True)
class Splits:
    """Raw rows. names: of the classes; None for a language model. test_split: what the rows of `test`
    are called. cut: whether `validation` was cut from the training rows, as which a model that was
    fine-tuned before may have seen them."""

    train: Dataset
    validation: Dataset
    test: Dataset
    names: list[str] | None
    test_split: str
    validation_split: str
    cut: bool

    def told(self) -> dict[str, str]:
        """Where the rows come from, in words."""
        return {
            "validation": f"Validation ({self.validation_split}, {len(self.validation):,} rows)",
            "test": f"test ({self.test_split}, {len(self.test):,} rows)",
        }


def three_splits(arguments: CompressArguments, validation_split: str) -> Splits:
    """Without a split of that name a tenth of the training rows chooses, always the same.

    Raises ValueError as `load_splits`, and for too few rows.
    """
    train, test, test_split = load_splits(arguments)
    labelled = arguments.task != "causal-lm"
    names = label_names(train, arguments.label_column) if labelled else None
    splits = load_all(arguments)
    cut = validation_split not in splits or validation_split == test_split
    if cut:
        if len(train) < 2:
            raise ValueError(f"{arguments.dataset} has too few rows to hold some out for validation.")
        train, validation = held_out(train)
        name = f"a tenth of {arguments.train_split}, held out"
    else:
        validation = first_rows(splits[validation_split], arguments.max_eval_rows)
        name = validation_split
    return Splits(train, validation, test, names, test_split, name, cut)


def metric_of(name: str | None, *, labelled: bool) -> Metric:
    """The metric of this name, or the usual one. Raises ValueError for one of another task."""
    known = tuple(SCORES) if labelled else ("perplexity",)
    name = name or known[0]
    if name not in known:
        raise ValueError(f"`metric` is {name!r}; for this task there is {', '.join(known)}.")
    return Metric(name=name, lower=not labelled, points=100.0 if labelled else 1.0)


def compute_scores(prediction: EvalPrediction) -> dict[str, float]:
    """Every score of `SCORES`."""
    chosen, labels = np.argmax(prediction.predictions, axis=-1), np.asarray(prediction.label_ids)
    return {name: score(chosen, labels) for name, score in SCORES.items()}
