"""`evaluate`'s Matthews correlation, without the download."""

from __future__ import annotations

import datasets
import evaluate

from hf_compress.metrics.functions import matthews


class Matthews(evaluate.Metric):
    """`compute(predictions=..., references=...)`, of class numbers; under `evaluate`'s own name."""

    def _info(self) -> evaluate.MetricInfo:
        label = datasets.Value("int64")
        return evaluate.MetricInfo(
            description="Correlation of predicted and true classes, of any number.",
            citation="Gorodkin (2004), doi.org/10.1016/j.compbiolchem.2004.09.006",
            inputs_description="predictions and references: class numbers, one for each row.",
            features=datasets.Features({"predictions": label, "references": label}),
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        return {"matthews_correlation": matthews(predictions, references)}
