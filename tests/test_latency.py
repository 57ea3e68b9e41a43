import json

import pytest
import torch
from tiny import tiny_bert, tiny_llama, tiny_t5, tiny_whisper
from torch import nn

from hf_compress.devices import cpu_flags
from hf_compress.latency import compare_decoding, compare_latency, measure_latency


class Recorder(nn.Module):
    """Notes in which order, mode and with which shapes it was called."""

    def __init__(self, name, calls):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.name, self.calls = name, calls

    def forward(self, x):
        self.calls.append((self.name, tuple(x.shape), self.training, torch.is_grad_enabled()))


def test_models_are_timed_in_turn_in_eval_mode_and_put_back():
    calls = []
    models = {name: Recorder(name, calls) for name in "ab"}
    models["b"].eval()
    found = compare_latency(models, {"x": torch.zeros(2, 5)}, runs=3, warmup=1)
    assert calls == [("a", (2, 5), False, False), ("b", (2, 5), False, False)] * 4
    assert models["a"].training
    assert not models["b"].training
    assert found["a"].runs == 3
    assert found["a"].inputs == {"x": [2, 5]}
    assert found["a"].threads == torch.get_num_threads()


def test_the_slower_model_is_seen_to_be_slower():
    # Fifty times the work: far above any noise.
    models = {"small": nn.Linear(64, 64), "large": nn.Sequential(*[nn.Linear(64, 64)] * 200)}
    found = compare_latency(models, {"input": torch.zeros(1, 64)}, runs=15)
    assert found["large"].median_ms > 5 * found["small"].median_ms > 0
    assert found["small"].p95_ms >= found["small"].median_ms


def test_what_is_no_module_gets_the_inputs_as_they_are():
    seen = []
    inputs = {"x": torch.zeros(2, 5)}
    compare_latency({"exported": lambda x: seen.append(x)}, inputs, runs=2, warmup=0)
    assert all(x.data_ptr() == inputs["x"].data_ptr() for x in seen)
    assert len(seen) == 2


def test_threads_are_those_asked_for_and_put_back():
    seen, before = [], torch.get_num_threads()
    timed = {"a": lambda x: seen.append(torch.get_num_threads())}
    found = compare_latency(timed, {"x": torch.zeros(1)}, runs=1, warmup=0, threads=before + 1)
    assert seen == [before + 1]
    assert found["a"].threads == before + 1
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("wrong", [{"runs": 0}, {"warmup": -1}, {"threads": 0}])
def test_impossible_runs_are_refused(wrong):
    with pytest.raises(ValueError, match="at least"):
        compare_latency({"a": nn.Linear(1, 1)}, {"input": torch.zeros(1, 1)}, **wrong)


def test_a_classifier_beside_its_baseline():
    small, dense = tiny_bert(layers=1, hidden=16), tiny_bert(layers=24, hidden=16)
    found = measure_latency(small, batch=2, length=9, baseline=dense, threads=1, runs=9)
    latency = found.model["forward"]
    assert latency.inputs == {"input_ids": [2, 9], "attention_mask": [2, 9]}
    assert (latency.runs, latency.threads) == (9, 1)
    ratio = found.baseline["forward"].median_ms / latency.median_ms
    assert found.ratios == {"forward": pytest.approx(ratio)}
    assert ratio > 2  # of 24 times the layers
    told = json.loads(json.dumps(found.to_dict()))
    assert told["hardware"]["flags"] == cpu_flags()
    assert told["versions"]["torch"] == torch.__version__
    assert told["ratios"] == found.ratios


def test_without_a_baseline_there_is_no_ratio():
    found = measure_latency(tiny_bert(), length=5, runs=1, warmup=0)
    assert found.baseline is None
    assert found.ratios == {}


def test_a_decoder_begins_once_and_goes_on_with_its_cache():
    model = tiny_llama().eval()
    ids = torch.arange(3, 11)[None].repeat(2, 1)
    calls = []
    model.register_forward_pre_hook(lambda _, args, inputs: calls.append(inputs), with_kwargs=True)
    found = compare_decoding({"model": model}, {"input_ids": ids}, new_tokens=3, runs=1, warmup=0)
    assert list(found["model"]) == ["prefill", "decode"]
    tokens = [inputs["input_ids"] for inputs in calls]
    assert [tuple(t.shape) for t in tokens] == [(2, 8), (2, 1), (2, 1), (2, 1)]
    # Each is the most probable one after those before, as found without any cache.
    with torch.no_grad():
        whole = tiny_llama().eval()(torch.cat(tokens[:3], 1)).logits
    assert torch.equal(torch.cat(tokens[1:], 1), whole[:, 7:].argmax(-1))


@pytest.mark.parametrize("make", [tiny_t5, tiny_whisper])
def test_an_encoder_runs_once_for_all_tokens(make):
    model = make().eval()
    encoded = []
    model.get_encoder().register_forward_hook(lambda *_: encoded.append(1))
    found = measure_latency(model, runs=2, warmup=1, new_tokens=4)
    assert list(found.model) == ["prefill", "decode"]
    assert len(encoded) == 3  # in each run


def test_nothing_to_decode_is_refused():
    with pytest.raises(ValueError, match="`new_tokens` must be at least 1, got 0"):
        compare_decoding({"model": tiny_llama()}, {}, new_tokens=0)
