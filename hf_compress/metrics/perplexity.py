"""Perplexity of losses that were measured. That of the Hub runs a model of its own for it."""

from __future__ import annotations

import datasets
import evaluate

from hf_compress.metrics.functions import mean_loss, perplexity


class Perplexity(evaluate.Metric):
    """`compute(predictions=mean losses, references=tokens)`: of each row or batch the mean negative
    log-likelihood in nats, and the number of tokens that it is the mean of."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="exp of the mean negative log-likelihood over all tokens.",
            citation="",
            inputs_description="predictions: mean negative log-likelihood of each row or batch, in "
            "nats; references: its number of tokens.",
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: list[float], references: list[int]) -> dict[str, float]:
        return {"perplexity": perplexity(mean_loss(predictions, references))}
