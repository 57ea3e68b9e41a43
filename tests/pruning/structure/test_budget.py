"""A budget in bytes or in time, and what is removed to meet it."""

import copy

import pytest
import torch
from anatomies import ANATOMIES, shaken
from torch import nn

from hf_compress.pruning.structure import budget
from hf_compress.pruning.structure.budget import fit_structure
from hf_compress.pruning.structure.removal import prune_structure


def bytes_of(model):
    return sum(p.numel() * p.element_size() for p in model.parameters())


@pytest.mark.parametrize("name", ANATOMIES)
def test_the_weights_take_no_more_than_asked_and_the_settings_make_the_same(name):
    model, batch = shaken(name, layers=3), ANATOMIES[name].batch()
    before = copy.deepcopy(model.state_dict())
    limit = int(0.8 * bytes_of(model))
    fitted = fit_structure(model, [batch], max_bytes=limit)
    assert fitted.bytes == (bytes_of(model), bytes_of(fitted.model))
    assert bytes_of(fitted.model) <= limit
    assert type(fitted.model) is type(model)
    assert fitted.speedup is None
    again = prune_structure(model, **fitted.settings, calibration=[batch])
    assert all(v.equal(again.state_dict()[k]) for k, v in fitted.model.state_dict().items())
    assert all(v.equal(before[k]) for k, v in model.state_dict().items())
    with torch.no_grad():
        assert fitted.losses[0] == pytest.approx(model(**batch).loss.item(), rel=1e-4)
        assert fitted.losses[1] == pytest.approx(fitted.model(**batch).loss.item(), rel=1e-4)


def priced(monkeypatch, price):
    """The seconds of a forward pass made up, as a function of the config: real ones vary."""

    def compare(models, inputs, *, runs):
        times = {name: price(model.config) for name, model in models.items()}
        return {name: type("Time", (), {"median_ms": ms}) for name, ms in times.items()}

    monkeypatch.setattr(budget, "compare_latency", compare)


def test_what_costs_much_time_and_little_loss_goes(monkeypatch):
    model, batch = shaken("llama", layers=3), ANATOMIES["llama"].batch()
    with torch.no_grad():
        idle = model.model.layers[1]  # does nothing, at the price of any other
        idle.self_attn.o_proj.weight.zero_()
        idle.mlp.down_proj.weight.zero_()
        model.lm_head.weight.mul_(10)
        # The model is sure of what it says, and right: whatever else goes is a loss.
        batch["labels"][:, 1:] = model(**batch).logits.argmax(-1)[:, :-1]
    priced(monkeypatch, lambda config: 1.0 + config.num_hidden_layers)
    fitted = fit_structure(model, [batch], speedup=1.3)
    assert fitted.settings == {"layers": 2}
    assert fitted.speedup == pytest.approx(4 / 3)
    assert fitted.losses[1] == pytest.approx(fitted.losses[0])


def test_a_prediction_that_was_wrong_is_mended(monkeypatch):
    model, batch = shaken("llama", layers=3), ANATOMIES["llama"].batch()
    # Neurons save nothing until three quarters of them are gone: no sum of parts tells that.
    priced(monkeypatch, lambda c: 1.0 + c.num_hidden_layers * (2 if c.intermediate_size > 16 else 1))
    fitted = fit_structure(model, [batch], speedup=3.0)
    size = 1.0 + fitted.model.config.num_hidden_layers * (
        2 if fitted.model.config.intermediate_size > 16 else 1
    )
    assert 7 / size >= 3.0
    assert fitted.speedup == pytest.approx(7 / size)


def test_real_seconds():
    model, batch = shaken("bert", layers=8), ANATOMIES["bert"].batch()
    fitted = fit_structure(model, [batch], speedup=1.2, kinds=["layers"], runs=10)
    assert fitted.model.config.num_hidden_layers < 8
    assert fitted.speedup >= 1.2


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({}, ValueError, "give one budget"),
        ({"speedup": 2.0, "max_bytes": 1000}, ValueError, "give one budget"),
        ({"speedup": 1.0}, ValueError, "above 1, such as 1.5"),
        ({"speedup": True}, ValueError, "above 1, such as 1.5"),
        ({"speedup": float("nan")}, ValueError, "above 1, such as 1.5"),
        ({"speedup": "2x"}, ValueError, "above 1, such as 1.5"),
        ({"max_bytes": 10**9}, ValueError, "a whole number below the"),
        ({"max_bytes": 0}, ValueError, "a whole number below the"),
        ({"max_bytes": 5e4}, ValueError, "a whole number below the"),
        ({"max_bytes": 100}, ValueError, "the nearest that was found takes.*or quantize"),
        ({"max_bytes": 50_000, "kinds": ["heads"]}, ValueError, "What can be: ffn, layers"),
        ({"max_bytes": 50_000, "score": "best"}, ValueError, "allowed are taylor"),
        ({"max_bytes": 50_000, "round_to": 0}, ValueError, "`round_to` is 0"),
        ({"max_bytes": 50_000, "calibration": []}, ValueError, "empty"),
        ({"max_bytes": 50_000, "calibration": "text"}, TypeError, "pass several batches"),
    ],
)
def test_refusals(settings, error, message):
    model = ANATOMIES["bert"].make()
    calibration = settings.pop("calibration", [ANATOMIES["bert"].batch()])
    with pytest.raises(error, match=message):
        fit_structure(model, calibration, **settings)


def test_labels_are_needed_whatever_the_score():
    batch = ANATOMIES["bert"].batch()
    del batch["labels"]
    with pytest.raises(ValueError, match="must carry labels"):
        fit_structure(ANATOMIES["bert"].make(), [batch], max_bytes=50_000, score="magnitude")


def test_a_model_of_ones_own_is_refused():
    with pytest.raises(ValueError, match="not a transformers model"):
        fit_structure(nn.Linear(4, 4), [ANATOMIES["bert"].batch()], max_bytes=20)
