"""A training that goes on from the grids that one-shot quantization found."""

import copy
from dataclasses import replace

import pytest
import torch
from calibrations import text
from quantization.test_callback import on_grid, trainer
from tiny import tiny_bert, tiny_gpt2, tiny_gpt_oss, tiny_mixtral
from transformers import TrainerCallback

from hf_compress import PruningCallback, QuantizationCallback, prune_oneshot_, quantize_oneshot_
from hf_compress.constraint import constrain
from hf_compress.quantization.quantizer import Quantizer
from hf_compress.targets import find_targets

SCHEMES = [
    ("gptq", {"bits": 4, "group_size": 16}),
    ("gptq", {"bits": 3, "grid": "median", "symmetric": False}),
    ("rtn", {"bits": 4, "grid": "absmax"}),
    ("rtn", {"bits": 2, "group_size": "tensor", "symmetric": False}),
]


def quantized(method="gptq", make=tiny_bert, **scheme):
    """The model on the grids that were found, and these."""
    model = make()
    batches = [text()] if method == "gptq" else None
    return model, quantize_oneshot_(model, batches, method=method, **scheme)


def weights_of(model):
    return {name: param.detach().clone() for name, param in find_targets(model).parameters.items()}


def equal(one, other):
    return all(value.equal(other[name]) for name, value in one.items())


@pytest.mark.parametrize(("method", "scheme"), SCHEMES, ids=str)
def test_the_first_step_sees_the_weights_of_one_shot_bit_for_bit(tmp_path, method, scheme):
    class Look(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            seen.append(weights_of(model))

    seen = []
    model, grids = quantized(method, **scheme)
    found, kept = weights_of(model), copy.deepcopy(grids)
    settings = {"end": 8} | scheme
    callback = QuantizationCallback(settings.pop("bits"), grids=grids, **settings)
    run = trainer(tmp_path, [callback, Look()], model)
    run.train()
    assert equal(found, seen[0])
    assert not equal(found, seen[-1])
    # What was given stays as it was, to the end.
    assert on_grid(run.model, callback)
    for name, grid in kept.items():
        assert grid.scale.equal(grids[name].scale)
        assert grid.scale.equal(callback.grids[name].scale)
    assert callback.describe()["given_grids"]


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_mixtral, tiny_gpt_oss])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_every_layout_and_dtype(make, dtype):
    model = make().to(dtype)
    grids = quantize_oneshot_(model, bits=4, group_size=8, grid="median", symmetric=False)
    selection, found = find_targets(model), weights_of(model)
    made = Quantizer(4, group_size=8, symmetric=False, grids=grids, targets=selection.targets)
    made.at(0, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    constrain(optimizer, selection.parameters, made)
    assert equal(found, weights_of(model))
    for step in range(1, 11):
        for param in selection.parameters.values():
            param.grad = torch.randn_like(param)
        made.at(step, 10)
        optimizer.step()
    assert equal(found, weights_of(model))


@pytest.mark.parametrize("settings", [{}, {"learn_scale": True}, {"bits": (4, 3)}], ids=str)
def test_resume_is_bit_equal(tmp_path, settings):
    settings = {"bits": 4, "group_size": 16, "end": 9} | settings
    bits = settings.pop("bits")

    def start():
        model, grids = quantized("rtn", bits=4, group_size=16)
        callback = QuantizationCallback(bits, grids=grids, **settings)
        return trainer(tmp_path, [callback], model, save_strategy="steps", save_steps=1), callback

    (whole, callback), *rest = start(), start(), start()
    whole.train()
    for stop, (run, other) in zip((2, 10), rest, strict=True):
        run.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
        assert equal(whole.model.state_dict(), run.model.state_dict())
        assert all(g.scale.equal(other.grids[name].scale) for name, g in callback.grids.items())


def test_fewer_bits_are_fitted(tmp_path):
    model, grids = quantized(bits=4, group_size=16)
    callback = QuantizationCallback((4, 2), group_size=16, grids=grids, end=6, interval=1)
    run = trainer(tmp_path, [callback], model)
    run.train()
    assert {grid.bits for grid in callback.grids.values()} == {2}
    assert on_grid(run.model, callback)
    name, grid = next(iter(grids.items()))
    assert not callback.grids[name].scale.equal(grid.scale)


def test_learnt_scales_leave_what_was_given_alone(tmp_path):
    model, grids = quantized(bits=3)
    before = copy.deepcopy(grids)
    callback = QuantizationCallback(3, grids=grids, learn_scale=True)
    trainer(tmp_path, [callback], model).train()
    for name, grid in before.items():
        assert grid.scale.equal(grids[name].scale)
        assert not grid.scale.equal(callback.grids[name].scale)


def test_what_was_pruned_before_stays_pruned(tmp_path):
    model = tiny_bert()
    prune_oneshot_(model, sparsity=0.5, score="magnitude")
    grids = quantize_oneshot_(model, [text()], bits=4, method="gptq")
    callbacks = [PruningCallback(0.5), QuantizationCallback(4, grids=grids)]
    run = trainer(tmp_path, callbacks, model)
    run.train()
    parameters = find_targets(run.model).parameters.values()
    assert sum(int((p == 0).sum()) for p in parameters) >= sum(p.numel() for p in parameters) // 2


def test_a_resume_with_other_grids_than_the_start_is_refused(tmp_path):
    def start(given, folder):
        model, grids = quantized("rtn", bits=4)
        callback = QuantizationCallback(4, grids=grids if given else None)
        return trainer(folder, [callback], model, save_strategy="steps", save_steps=2)

    for given, message in ((True, "was given by `grids`: resume with them"), (False, "without them")):
        folder = tmp_path / str(given)
        start(given, folder).train()
        with pytest.raises(ValueError, match=message):
            start(not given, folder).train(resume_from_checkpoint=str(folder / "checkpoint-4"))


NAME = "bert.encoder.layer.0.attention.self.query.weight"

REFUSED = [
    ({"bits": 8}, None, "has 4 bits: pass `bits=4`"),
    ({"bits": 4, "symmetric": False}, None, "has no zero points: pass `symmetric=True`"),
    ({"bits": 4, "group_size": 16}, None, r"shape \(32, 1\), and `group_size=16` asks for \(32, 2\)"),
    ({"bits": 4, "ignore": "query"}, None, "query.weight is in `grids` and no target"),
    ({"bits": 4}, lambda grids: dict(list(grids.items())[1:]), f"{NAME} is a target and not in"),
    (
        {"bits": 4},
        lambda grids: {name: replace(grid, scale=grid.scale.double()) for name, grid in grids.items()},
        "is torch.float64 and the weight torch.float32",
    ),
]


@pytest.mark.parametrize(("settings", "change", "message"), REFUSED)
def test_grids_of_another_kind_are_refused(settings, change, message):
    model, grids = quantized("rtn", bits=4)
    found, settings = weights_of(model), dict(settings)
    bits = settings.pop("bits")
    callback = QuantizationCallback(bits, grids=grids if change is None else change(grids), **settings)
    with pytest.raises(ValueError, match=message):
        callback.dry_run(model)
    assert equal(found, weights_of(model))


def test_no_grids_at_all_are_refused():
    with pytest.raises(ValueError, match="`grids` is empty: pass what `quantize_oneshot_` returns"):
        QuantizationCallback(4, grids={})
