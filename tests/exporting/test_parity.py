import math

import pytest
import torch
from tiny import tiny_bert, tiny_llama
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_compress.exporting.parity import compare, single_rows

IDS = torch.arange(5, 17).reshape(2, 6)


def changed(model, change):
    """`model`, with its logits changed."""

    def run(**inputs):
        with torch.no_grad():
            return SequenceClassifierOutput(logits=change(model(**inputs).logits))

    return run


def test_what_agrees_and_what_does_not():
    model = tiny_bert().eval()
    with torch.no_grad():
        logits = model(IDS).logits
    batch = {"input_ids": IDS, "labels": logits.argmax(-1)}
    found = compare(model, changed(model, lambda logits: logits), [batch, batch])
    assert (found.rows, found.predictions) == (4, 4)
    assert (found.agreement, found.max_difference) == (1.0, 0.0)
    assert found.torch == found.exported == {"accuracy": 1.0, "f1": 1.0}

    def first_row_otherwise(logits):
        other = logits.clone()
        other[0] = -other[0]
        return other

    found = compare(model, changed(model, first_row_otherwise), [batch])
    assert found.agreement == 0.5
    assert found.exported["accuracy"] == 0.5
    assert found.torch["accuracy"] == 1.0
    assert found.max_difference == pytest.approx(float(2 * logits[0].abs().max()))


def test_a_language_model_is_compared_where_nothing_is_padded():
    model = tiny_llama().eval()
    mask = torch.ones_like(IDS)
    mask[0, 4:] = 0

    def wrong_in_padding(logits):
        other = logits.clone()
        other[0, 4:] = 99.0
        return other

    batch = {"input_ids": IDS, "attention_mask": mask, "labels": IDS.masked_fill(mask == 0, -100)}
    found = compare(model, changed(model, wrong_in_padding), [batch])
    assert (found.rows, found.predictions, found.agreement) == (2, 10, 1.0)
    with torch.no_grad():
        loss = model(**batch).loss
    assert found.torch["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert found.exported["perplexity"] == pytest.approx(found.torch["perplexity"], rel=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [(lambda logits: logits[:1], "are not finite"), (lambda logits: logits * math.nan, "of no use")],
)
def test_an_export_of_no_use_is_refused(change, message):
    model = tiny_bert().eval()
    with pytest.raises(ValueError, match=message):
        compare(model, changed(model, change), [{"input_ids": IDS}])
    with pytest.raises(ValueError, match="no rows"):
        compare(model, changed(model, change), [])


def test_single_rows_of_one_length():
    batch = {
        "input_ids": IDS,
        "attention_mask": torch.ones_like(IDS),
        "labels": torch.tensor([1, 0]),
    }
    rows = list(single_rows([batch], 8, 7))
    assert [row["input_ids"].tolist() for row in rows] == [
        [[5, 6, 7, 8, 9, 10, 7, 7]],
        [[11, 12, 13, 14, 15, 16, 7, 7]],
    ]
    assert rows[0]["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 1, 0, 0]]
    assert [row["labels"].tolist() for row in rows] == [[1], [0]]
    (tokens,) = single_rows([{"input_ids": IDS[:1], "labels": IDS[:1]}], 8, 7)
    assert tokens["labels"].tolist() == [[5, 6, 7, 8, 9, 10, -100, -100]]
    images = {"pixel_values": torch.zeros(2, 3, 4, 4)}
    assert [row["pixel_values"].shape for row in single_rows([images], 3, 0)] == [(1, 3, 4, 4)] * 2
