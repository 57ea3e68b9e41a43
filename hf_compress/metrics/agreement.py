"""How often a student chooses what its teacher chooses."""

from __future__ import annotations

import datasets
import evaluate

from hf_compress.metrics.functions import agreement


class Agreement(evaluate.Metric):
    """`compute(predictions=student's choices, references=teacher's choices)`, of class numbers."""

    def _info(self) -> evaluate.MetricInfo:
        label = datasets.Value("int64")
        return evaluate.MetricInfo(
            description="Fraction of the teacher's most probable classes that are the student's too.",
            citation="",
            inputs_description="predictions: classes that the student holds the most probable, of each "
            "row or token; references: those of the teacher.",
            features=datasets.Features({"predictions": label, "references": label}),
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        return {"agreement": agreement(predictions, references)}
