"""Exact match and F1 of answers to questions, as SQuAD counts them."""

from __future__ import annotations

import datasets
import evaluate

from hf_compress.metrics.text import answer_f1, exact_match


class Answers(evaluate.Metric):
    """`compute(predictions=["Paris"], references=[["Paris", "in Paris"]])`; an empty list for a
    question without an answer. Both scores are fractions, where those of SQuAD are percents."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="Fraction of answers that are right to the word, and F1 of their words.",
            citation="Rajpurkar et al., arxiv.org/abs/1606.05250 and 1806.03822",
            inputs_description="predictions: an answer to each question; references: a list of those "
            "that are accepted.",
            features=datasets.Features({"predictions": text, "references": datasets.Sequence(text)}),
        )

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, float]:
        return {
            "exact_match": exact_match(predictions, references),
            "f1": answer_f1(predictions, references),
        }
