import json

import pytest
import torch
from tiny import tiny_bert, tiny_llama
from torch import nn

from hf_compress.latency import compare_latency
from hf_compress.measure import (
    CompressionReport,
    Measurement,
    bytes_on_disk,
    count_weights,
    environment,
    peak_memory,
)

IDS = torch.arange(5, 17)[None]


def test_zeros_are_counted_by_tensor():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2, bias=False))
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[0].weight[0, :3] = 0
        model[0].bias.copy_(torch.tensor([0.0, -0.0, 2.0]))
        model[1].weight.fill_(-1e-30)
    weights = count_weights(model)
    assert weights.by_name == {"0.weight": (12, 9), "0.bias": (3, 1), "1.weight": (6, 6)}
    assert (weights.parameters, weights.nonzeros) == (21, 16)


def test_a_tied_tensor_counts_once():
    tied, untied = (count_weights(tiny_llama(tie_word_embeddings=tie)) for tie in (True, False))
    assert untied.parameters - tied.parameters == 96 * 32


@pytest.mark.parametrize("bits", [8, 4])
def test_packed_weights_count_as_what_they_stand_for(bits, tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM

    from hf_compress.quantization.bnb import load_quantized

    model = tiny_llama(hidden=64)
    model.save_pretrained(tmp_path)
    packed = load_quantized(tmp_path, bits, AutoModelForCausalLM)
    assert count_weights(packed).parameters == count_weights(model).parameters
    assert bytes_on_disk(tmp_path) > 4 * count_weights(model).parameters


def test_bytes_need_a_saved_model(tmp_path):
    with pytest.raises(FileNotFoundError, match="save the model there first"):
        bytes_on_disk(tmp_path)


def test_a_report_is_json_and_says_how_much_is_left():
    model = tiny_bert()
    latency = compare_latency({"model": model}, {"input_ids": IDS}, runs=3)["model"]
    compressed = Measurement(
        parameters=10,
        nonzeros=2,
        bytes=40,
        latency=latency,
        metrics={"accuracy": 0.9, "new": 1.0, "loss_task": 0.5, "zero": 1.0},
    )
    dense = Measurement(
        parameters=10, nonzeros=10, bytes=40, metrics={"accuracy": 0.96, "loss_task": 0.4, "zero": 0.0}
    )
    report = CompressionReport(compressed=compressed, dense=dense, environment=environment())
    assert report.recovery("accuracy") == pytest.approx(93.75)
    assert report.recovery("new") is None
    assert report.recovery("zero") is None
    assert report.recovery("loss_task") == pytest.approx(80)
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["compressed"]["latency"]["inputs"] == {"input_ids": [1, 12]}
    assert plain["compressed"]["peak_memory_bytes"] is None
    assert plain["environment"]["versions"]["torch"] == torch.__version__
    assert plain["environment"]["cpu"]


def test_peak_memory_is_that_of_the_model(tmp_path):
    # 134 MB in its layers. Of a large embedding only the rows that are looked up would be in memory.
    tiny_bert(hidden=1024, layers=4).save_pretrained(tmp_path)
    peak = peak_memory(tmp_path, "BertForSequenceClassification", {"input_ids": IDS})
    assert 128e6 < peak < 500e6


@pytest.mark.slow
def test_a_model_that_does_not_load_says_why(tmp_path):
    tiny_bert().save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="NoSuchClass"):
        peak_memory(tmp_path, "NoSuchClass", {"input_ids": IDS})


def test_peak_memory_needs_a_saved_model(tmp_path):
    with pytest.raises(FileNotFoundError, match="save the model there first"):
        peak_memory(tmp_path, "BertForSequenceClassification", {"input_ids": IDS})
