"""`evaluate`'s word error rate, without the download and its package."""

from __future__ import annotations

import datasets
import evaluate

from hf_compress.metrics.text import word_error_rate


class WER(evaluate.Metric):
    """`compute(predictions=..., references=...)`, of texts. Normalise both before, where case or
    punctuation should not count."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="Words to insert, delete or replace, over the words of the references.",
            citation="",
            inputs_description="predictions and references: transcriptions, one for each recording.",
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        return {"wer": word_error_rate(predictions, references)}
