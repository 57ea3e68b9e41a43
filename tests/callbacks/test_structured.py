"""Neurons and heads that go while a Trainer trains."""

import copy
import logging

import pytest
import torch
from anatomies import ANATOMIES, shaken
from short import arguments, trainer
from tiny import (
    classification_rows,
    language_rows,
    tiny_bert,
    tiny_llama,
)
from transformers import Trainer, TrainerCallback

from hf_compress import constrain
from hf_compress.callbacks.structured import StructuredPruningCallback
from hf_compress.pruning.structure.pruner import UnitPruner
from hf_compress.pruning.structure.removal import alive, shrink
from hf_compress.pruning.structure.units import find_units


def gone(model, kind):
    return [int((~alive(u)).sum()) for u in find_units(model, [kind])]


def test_units_go_along_the_schedule_everywhere_alike(tmp_path):
    callback = StructuredPruningCallback(ffn=0.5, heads=0.5, schedule="linear", start=4, end=12)
    run = trainer(tmp_path, callback, tiny_llama(), language_rows, save_strategy="steps", save_steps=8)
    run.train()
    logged = {
        r["step"]: (r["ffn_sparsity"], r["heads_sparsity"])
        for r in run.state.log_history
        if "loss" in r
    }
    assert logged[4] == (0.0, 0.0)
    assert logged[8] == (16 / 64, 0.0)  # half of the way, and half a group is rounded to even
    assert logged[12] == logged[20] == (0.5, 0.5)
    half = type(run.model).from_pretrained(tmp_path / "checkpoint-8")
    assert gone(half, "ffn") == [16, 16]
    assert gone(run.model, "ffn") == [32, 32]
    assert gone(run.model, "heads") == [1, 1]
    smaller = shrink(run.model).eval()
    assert smaller.config.intermediate_size == 32
    assert smaller.config.num_key_value_heads == 1
    batch = ANATOMIES["llama"].batch()
    with torch.no_grad():
        found, expected = smaller(**batch).logits, run.model.eval()(**batch).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert callback.finished
    assert callback.describe()["ffn"] == 0.5


@pytest.mark.parametrize(
    ("optim", "step"),
    [("adamw_torch", 4), ("adamw_torch", 15), ("adamw_bnb_8bit", 4), ("adafactor", 4), ("sgd", 4)],
)
def test_resume_is_bit_equal(tmp_path, optim, step):
    settings = {"optim": optim, "save_strategy": "steps", "save_steps": step}

    def run():
        callback = StructuredPruningCallback(ffn=0.5, heads=0.5, start=1)
        return trainer(tmp_path, callback, tiny_llama(), language_rows, **settings)

    whole = run()
    whole.train()
    rest = run()
    rest.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert all(v.equal(rest.model.state_dict()[k]) for k, v in whole.model.state_dict().items())
    assert gone(rest.model, "ffn") == [32, 32]


@pytest.mark.parametrize("name", ["gpt2", "t5", "vit", "whisper"])
def test_the_trained_model_shrinks_in_every_layout(name):
    model, batch = shaken(name), ANATOMIES[name].batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    pruners = [
        UnitPruner(find_units(model, [kind]), 0.5)
        for kind, weights in (("ffn", 1), ("heads", ANATOMIES[name].head))
        if weights
    ]
    for pruner in pruners:
        constrain(optimizer, pruner.parameters, pruner)
    for step in range(1, 11):
        model(**batch).loss.backward()
        for pruner in pruners:
            pruner.at(step, 10)
        optimizer.step()
        optimizer.zero_grad()
    assert all(pruner.finished for pruner in pruners)
    smaller = shrink(model)
    assert smaller.num_parameters() < model.num_parameters()
    with torch.no_grad():
        torch.testing.assert_close(smaller(**batch).logits, model(**batch).logits, rtol=1e-5, atol=1e-5)


def test_the_lowest_average_goes_first():
    model, batch = shaken("bert"), ANATOMIES["bert"].batch()
    found = find_units(model, ["ffn"])
    pruner = UnitPruner(found, 0.25, schedule="constant", start=0, end=3, decay=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    constrain(optimizer, pruner.parameters, pruner)
    averages = [torch.zeros(64) for _ in found]
    for step in (1, 2, 3):
        model(**batch).loss.backward()
        for average, u in zip(averages, found, strict=True):
            weight = model.get_submodule(u.name).weight
            average.mul_(0.5).add_((weight * weight.grad).sum(0).abs(), alpha=0.5)
        if step < 3:
            pruner.at(step, 100)
            pruner.schedule = UnitPruner(found, 0.25, start=3, end=3).schedule
        else:
            pruner.at(step, 100)
        optimizer.step()
        optimizer.zero_grad()
    for average, u in zip(averages, found, strict=True):
        lowest = average.argsort()[:16]
        assert (~alive(u)).nonzero().flatten().tolist() == sorted(lowest.tolist())


def test_units_do_not_come_back():
    model, batch = shaken("bert"), ANATOMIES["bert"].batch()
    found = find_units(model, ["ffn"])
    pruner = UnitPruner(found, 0.5, schedule="linear", start=0, end=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    constrain(optimizer, pruner.parameters, pruner)
    dead = [torch.zeros(64, dtype=torch.bool) for _ in found]
    for step in (1, 2, 3, 4):
        model(**batch).loss.backward()
        pruner.at(step, 4)
        optimizer.step()
        optimizer.zero_grad()
        now = [~alive(u) for u in found]
        for u, before, after in zip(found, dead, now, strict=True):
            assert int(after.sum()) == 8 * step
            assert after[before].all()
            # As if those that went had been worth most, shortly before.
            optimizer.state[model.get_submodule(u.name).weight]["hf_compress_unit_average"][after] = 1e6
        dead = now


def test_no_checkpoint_is_the_best_before_all_have_gone(tmp_path):
    run = Trainer(
        tiny_bert(),
        arguments(
            tmp_path,
            max_steps=12,
            learning_rate=1e-3,
            eval_strategy="steps",
            eval_steps=2,
            save_strategy="steps",
            save_steps=2,
            load_best_model_at_end=True,
            metric_for_best_model="loss",
            greater_is_better=True,  # the first one would win
        ),
        train_dataset=classification_rows(),
        eval_dataset=classification_rows(16, seed=1),
        callbacks=[StructuredPruningCallback(ffn=0.5)],
    )
    run.train()
    assert run.state.best_global_step >= 7
    assert gone(run.model, "ffn") == [32, 32]


def test_a_training_that_ends_early_is_told(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("hf_compress"), "propagate", True)
    callback = StructuredPruningCallback(ffn=0.5, start=0, end=10, schedule="linear")
    run = trainer(tmp_path, callback, max_steps=10)
    run.add_callback(StopAt(5))
    run.train()
    assert "before the schedule" in caplog.text
    assert callback.measurements() == {"ffn_sparsity": 0.25}
    assert not callback.finished


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def test_what_was_loaded_at_the_end_is_counted(tmp_path):
    callback = StructuredPruningCallback(ffn=0.5)
    run = trainer(tmp_path, callback)
    dense = copy.deepcopy(run.model.state_dict())
    run.callback_handler.callbacks.insert(0, LoadAtTheEnd(dense))
    run.train()
    assert callback.measurements() == {"ffn_sparsity": 0.0}


class LoadAtTheEnd(TrainerCallback):
    def __init__(self, state_dict):
        self.state_dict = state_dict

    def on_train_end(self, args, state, control, model=None, **kwargs):
        model.load_state_dict(self.state_dict)


def test_units_that_are_zero_count_as_gone():
    model = tiny_bert()
    found = find_units(model, ["ffn"])
    with torch.no_grad():
        for u in found:
            for piece in u.slices:
                piece.param.index_fill_(piece.dim, piece.entries([3, 5]), 0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = UnitPruner(found, 0.5)
    constrain(optimizer, pruner.parameters, pruner)
    assert pruner.pruned == 4
    few = UnitPruner(found, 1 / 64)
    with pytest.raises(ValueError, match="2 ffn of .*zero already, more than the 1"):
        constrain(torch.optim.SGD(model.parameters(), lr=0.1), few.parameters, few)


def test_weights_stay_what_they_were_where_nothing_goes(tmp_path):
    """Before the schedule begins the callback changes nothing, bit for bit."""
    plain = Trainer(
        tiny_bert(),
        trainer(tmp_path, StructuredPruningCallback(ffn=0.5)).args,
        train_dataset=classification_rows(),
    )
    plain.train()
    callback = StructuredPruningCallback(ffn=0.5, start=20, end=20)
    run = trainer(tmp_path, callback)
    run.train()
    kept = {u.name: alive(u) for u in find_units(run.model, ["ffn"])}
    for name, living in kept.items():
        found, expected = (m.get_submodule(name).weight[:, living] for m in (run.model, plain.model))
        assert found.equal(expected)
