"""`evaluate`'s accuracy, without the download. Apart, since `evaluate` takes seconds to import."""

from __future__ import annotations

import datasets
import evaluate

from hf_compress.metrics.functions import accuracy


class Accuracy(evaluate.Metric):
    """`Accuracy(keep_in_memory=True).compute(predictions=..., references=...)`, of class numbers.

    Made and used as what `evaluate.load("accuracy")` returns, which needs the Hub.
    """

    def _info(self) -> evaluate.MetricInfo:
        label = datasets.Value("int64")
        return evaluate.MetricInfo(
            description="Fraction of predicted class numbers that equal the references.",
            citation="",
            inputs_description="predictions and references: class numbers, one for each row.",
            features=datasets.Features({"predictions": label, "references": label}),
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        return {"accuracy": accuracy(predictions, references)}
