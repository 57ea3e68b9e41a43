"""`evaluate`'s F1, without the download."""

from __future__ import annotations

import datasets
import evaluate

from hf_compress.metrics.functions import Average, f1


class F1(evaluate.Metric):
    """`compute(predictions=..., references=..., average="macro", pos_label=1)`, of class numbers.

    Unlike that of the Hub the default is "macro", which also works for more than two classes.
    """

    def _info(self) -> evaluate.MetricInfo:
        label = datasets.Value("int64")
        return evaluate.MetricInfo(
            description="Harmonic mean of precision and recall.",
            citation="",
            inputs_description="predictions and references: class numbers, one for each row. average: "
            "macro, micro, weighted, or binary for `pos_label` alone.",
            features=datasets.Features({"predictions": label, "references": label}),
        )

    def _compute(
        self,
        predictions: list[int],
        references: list[int],
        average: Average = "macro",
        pos_label: int = 1,
    ) -> dict[str, float]:
        return {"f1": f1(predictions, references, average=average, pos_label=pos_label)}
