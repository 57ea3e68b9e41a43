"""Quantization inside the Trainer: what the model, the logs, the checkpoints and a resumed run see."""

import json
import re

import pytest
from safetensors.torch import load_file
from short import arguments
from tiny import classification_rows, tiny_bert
from transformers import (
    AutoModelForSequenceClassification,
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
)

from hf_compress import PruningCallback, QuantizationCallback
from hf_compress.quantization.grids import fake_quantize, grouped
from hf_compress.targets import find_targets

STEPS = 12
EACH_STEP = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 2}


def trainer(folder, callbacks, model=None, **settings):
    defaults = {"max_steps": STEPS, "learning_rate": 1e-2}
    return Trainer(
        model or tiny_bert(),
        arguments(folder, **(defaults | settings)),
        train_dataset=classification_rows(),
        eval_dataset=classification_rows(seed=1),
        callbacks=callbacks,
    )


def levels(tensors, names, group_size=None):
    """The most distinct values in a group."""
    groups = [grouped(tensors[n], input_dim=1, group_size=group_size).flatten(0, -2) for n in names]
    return max(len(row.unique()) for rows in groups for row in rows)


def on_grid(model, callback):
    for name, target in find_targets(model).targets.items():
        groups = grouped(target.param.detach(), input_dim=1, group_size=callback.group_size)
        if not fake_quantize(groups, callback.grids[name]).equal(groups):
            return False
    return True


class Watch(TrainerCallback):
    """Counts the levels of the weights whenever the model is evaluated."""

    def __init__(self):
        self.seen = {}

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        tensors = model.state_dict()
        self.seen[state.global_step] = levels(tensors, find_targets(model).targets)


def test_what_is_evaluated_and_saved_lies_on_the_grid(tmp_path):
    callback, watch = QuantizationCallback((8, 3), start=3, end=8, interval=2), Watch()
    run = trainer(tmp_path, [callback, watch], **EACH_STEP)
    run.train()
    logged = {row["step"]: row["bits"] for row in run.state.log_history if "loss" in row}
    assert logged == {1: 32, 2: 32} | dict.fromkeys(range(3, 8), 8) | dict.fromkeys(range(8, 13), 3)
    names = find_targets(run.model).targets
    assert watch.seen[2] > 30  # members of a group
    for step in (8, 10, 12):
        tensors = load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors")
        assert set(tensors) == set(tiny_bert().state_dict())
        assert max(levels(tensors, names), watch.seen[step]) <= 8
    assert on_grid(run.model, callback)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "checkpoint-12")
    assert on_grid(plain, callback)
    assert run.model.classifier.weight.unique().numel() > 90


def test_it_learns_on_the_grid(tmp_path):
    run = trainer(tmp_path, [QuantizationCallback(3, interval=5)], max_steps=60)
    run.train()
    losses = [row["loss"] for row in run.state.log_history if "loss" in row]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_bnb_8bit", "adafactor"])
def test_resume_is_bit_equal(tmp_path, optim):
    settings = {"optim": optim, "save_strategy": "steps", "save_steps": 5}
    quantization = {"group_size": 16, "symmetric": False, "grid": "median", "interval": 2, "end": 8}

    def start():
        return trainer(tmp_path, [QuantizationCallback((8, 4), **quantization)], **settings)

    whole, rest = start(), start()
    whole.train()
    rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    expected = whole.model.state_dict()
    assert all(value.equal(expected[name]) for name, value in rest.model.state_dict().items())
    one, other = (run.callback_handler.callbacks[-2].grids for run in (whole, rest))
    assert all(grid.scale.equal(other[name].scale) for name, grid in one.items())


@pytest.mark.parametrize("pruning_first", [True, False])
def test_with_pruning_in_any_order(tmp_path, pruning_first):
    pruning = PruningCallback(0.6, interval=2, end=6)
    callback = QuantizationCallback(4, interval=2, end=8)
    both = [pruning, callback] if pruning_first else [callback, pruning]
    run = trainer(tmp_path, both, save_strategy="steps", save_steps=5)
    run.train()
    assert on_grid(run.model, callback)
    parameters = find_targets(run.model).parameters
    zeros = sum(int((p == 0).sum()) for p in parameters.values())
    assert zeros >= round(0.6 * sum(p.numel() for p in parameters.values()))
    row = run.state.log_history[-2]
    assert row["sparsity"] == pytest.approx(0.6, abs=1e-3)
    assert row["bits"] == 4
    rest = trainer(
        tmp_path / "rest",
        [QuantizationCallback(4, interval=2, end=8), PruningCallback(0.6, interval=2, end=6)],
    )
    rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    expected = run.model.state_dict()
    assert all(value.equal(expected[name]) for name, value in rest.model.state_dict().items())


def test_the_best_checkpoint_lies_on_the_final_grid(tmp_path):
    callback = QuantizationCallback((8, 4), interval=2, end=0.5)
    run = trainer(
        tmp_path,
        [callback, EarlyStoppingCallback(2)],
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,
        learning_rate=0.05,
        **EACH_STEP,
    )
    run.train()
    assert 6 <= run.state.best_global_step < 12
    assert {grid.bits for grid in callback.grids.values()} == {4}
    assert on_grid(run.model, callback)


def test_ending_early_is_told(tmp_path, caplog):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    from transformers.utils import logging as transformers_logging

    transformers_logging.enable_propagation()
    trainer(tmp_path, [QuantizationCallback((8, 4)), Stop()]).train()
    assert "have 8 bits, and their grid of 4 is not final: training ended at step 3" in caplog.text


def test_a_second_training_starts_anew(tmp_path):
    callback = QuantizationCallback(4, interval=2)
    run = trainer(tmp_path, [callback])
    run.train()
    run.train()
    assert on_grid(run.model, callback)
    assert not any(
        str(key).startswith("hf_compress") for s in run.optimizer.state.values() for key in s
    )


def test_dry_run_tells_what_will_happen_and_changes_nothing():
    model = tiny_bert()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan = QuantizationCallback(4, group_size=16, symmetric=False).dry_run(model)
    text = str(plan)
    assert "quantized to 4 bit: 13 weights" in text
    assert re.search(r"layer.0.attention.self.query.weight +32x32  64 scales", text)
    assert "1 x output head" in text
    assert "run no faster" in text
    sizes = [p.numel() for p in find_targets(model).parameters.values()]
    # Four bits for each weight; for each group of 16 a float scale and a zero point of four bits.
    saved = sum(4 * n - n // 2 - n // 16 * 4 - n // 32 for n in sizes)
    assert plan.bytes - plan.packed_bytes == saved
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="does not divide"):
        QuantizationCallback(4, group_size=24).dry_run(model)


def test_description_is_json(tmp_path):
    callback = QuantizationCallback((8, 4), interval=2)
    trainer(tmp_path, [callback]).train()
    described = json.loads(json.dumps(callback.describe()))
    assert described["bits"] == [8, 4]
    assert set(described["quantized"].values()) == {4}
    assert len(described["quantized"]) == 13


def test_a_checkpoint_without_quantization_is_refused(tmp_path):
    trainer(tmp_path, [], save_strategy="steps", save_steps=5).train()
    run = trainer(tmp_path, [QuantizationCallback(4)])
    with pytest.raises(ValueError, match=r"knows nothing of this quantization.*start=5"):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
