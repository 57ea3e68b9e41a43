import json
import logging

import pytest
import torch
from safetensors.torch import load_file
from tiny import classification_rows, tiny_bert
from transformers import (
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_compress import PruningCallback
from hf_compress.callbacks.family import ROUNDING, FamilyCallback
from hf_compress.callbacks.structured import StructuredPruningCallback
from hf_compress.metrics.functions import accuracy
from hf_compress.targets import find_targets

LEVELS = (0.3, 0.5, 0.8)
STEPS = 20


def score(prediction):
    return {"accuracy": accuracy(prediction.predictions.argmax(-1), prediction.label_ids)}


def trainer(tmp_path, *, pruning=None, callbacks=(), folder="family", **settings):
    """A linear ramp to 80 % in 16 of 20 steps, with an evaluation at every third."""
    pruning = pruning or PruningCallback(0.8, schedule="linear", end=16, interval=1)
    defaults = {
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    return Trainer(
        tiny_bert(),
        TrainingArguments(str(tmp_path / "run"), **(defaults | settings)),
        train_dataset=classification_rows(),
        eval_dataset=classification_rows(24, seed=1),
        compute_metrics=score,
        callbacks=[
            pruning,
            FamilyCallback(pruning, folder=tmp_path / folder, levels=LEVELS),
            *callbacks,
        ],
    )


def read(folder):
    return {
        float(level): row for level, row in json.loads((folder / "family.json").read_text()).items()
    }


def weights(folder, row):
    return load_file(folder / row["folder"] / "model.safetensors")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run = trainer(folder)
    run.train()
    return run, folder / "family"


def test_each_level_has_the_best_model_that_was_evaluated_in_it(run):
    trained, folder = run
    family = read(folder)
    assert list(family) == list(LEVELS)
    evaluated = [row for row in trained.state.log_history if "eval_loss" in row]
    for level, above in zip(LEVELS, (*LEVELS[1:], 2), strict=True):
        within = [r for r in evaluated if level - ROUNDING <= r["sparsity"] < above - ROUNDING]
        best = min(within, key=lambda row: row["eval_loss"])
        row = family[level]
        assert (row["step"], row["metric"]) == (best["step"], best["eval_loss"])
        assert row["sparsity"] == best["sparsity"]


def test_each_model_loads_plainly_and_is_what_was_measured(run):
    trained, folder = run
    for row in read(folder).values():
        model = BertForSequenceClassification.from_pretrained(folder / row["folder"])
        assert row["nonzeros"] == sum(int(torch.count_nonzero(p)) for p in model.parameters())
        targets = find_targets(model).parameters.values()
        zeros = sum(int((p == 0).sum()) for p in targets)
        assert zeros / sum(p.numel() for p in targets) == pytest.approx(row["sparsity"])
        found = Trainer(model, trained.args, eval_dataset=trained.eval_dataset).evaluate()
        assert found["eval_loss"] == pytest.approx(row["metric"], rel=1e-5)


def test_reaching_a_level_is_evaluated_at_once(run):
    trained, folder = run
    steps = [row["step"] for row in trained.state.log_history if "eval_loss" in row]
    # 5 % a step: 30 % after 6 steps, 50 % after 10 and 80 % after 16; Trainer adds the last step.
    assert steps == [3, 6, 9, 10, 12, 15, 16, 18, STEPS]
    assert (folder / "family.png").read_bytes().startswith(b"\x89PNG")
    names = {file.name for file in folder.iterdir()}
    assert names == {"family.json", "family.png", "sparse30", "sparse50", "sparse80"}


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 11


@pytest.mark.parametrize("checkpoint", [5, 10])
def test_a_resumed_training_ends_with_the_same_family(run, tmp_path, checkpoint):
    _, folder = run
    saving = {"save_strategy": "steps", "save_steps": 5}
    trainer(tmp_path, callbacks=[Stop()], **saving).train()
    assert set(read(tmp_path / "family")) == {0.3, 0.5}
    resumed = trainer(tmp_path, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{checkpoint}"))
    assert read(tmp_path / "family") == read(folder)
    for row in read(folder).values():
        one, other = weights(folder, row), weights(tmp_path / "family", row)
        assert all(tensor.equal(other[name]) for name, tensor in one.items())


def test_better_is_what_the_trainer_takes_for_better(tmp_path):
    trained = trainer(tmp_path, metric_for_best_model="accuracy")
    trained.train()
    evaluated = [row for row in trained.state.log_history if "eval_accuracy" in row]
    last = [row for row in evaluated if row["sparsity"] >= 0.8 - ROUNDING]
    assert read(tmp_path / "family")[0.8]["metric"] == max(row["eval_accuracy"] for row in last)


def test_the_best_checkpoint_is_still_found(tmp_path):
    settings = {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 3}
    trained = trainer(tmp_path, **settings)
    trained.train()
    # It may be the best, though neither evaluations nor checkpoints were due.
    assert (tmp_path / "run" / "checkpoint-16").is_dir()
    last = [r for r in trained.state.log_history if "eval_loss" in r and r["step"] >= 16]
    best = min(last, key=lambda row: row["eval_loss"])
    assert trained.state.best_model_checkpoint.endswith(f"checkpoint-{best['step']}")
    found = trained.model.state_dict()
    for name, tensor in weights(tmp_path / "family", read(tmp_path / "family")[0.8]).items():
        assert found[name].equal(tensor)


def test_evaluations_after_the_training_change_nothing(run):
    trained, folder = run
    before = read(folder)
    trained.evaluate(trained.eval_dataset.select(range(1)))
    assert read(folder) == before


def test_a_new_training_replaces_the_family_and_nothing_else_is_touched(tmp_path):
    trainer(tmp_path, max_steps=16).train()
    first = read(tmp_path / "family")
    trainer(tmp_path, max_steps=8, pruning=PruningCallback(0.8, end=8, interval=1)).train()
    second = read(tmp_path / "family")
    assert second.keys() == first.keys()
    assert second != first
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.txt").touch()
    with pytest.raises(FileExistsError, match="holds something else"):
        trainer(tmp_path, folder="theirs").train()


def test_levels_that_are_passed_over_are_told(tmp_path, caplog):
    jump = PruningCallback(0.8, schedule="constant", start=2, end=2)
    with caplog.at_level(logging.WARNING):
        trainer(tmp_path, pruning=jump, max_steps=4).train()
    assert "no model was saved at [0.3, 0.5]" in caplog.text
    assert list(read(tmp_path / "family")) == [0.8]


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ((), r"`levels` is \(\)"),
        (0.5, "`levels` is 0.5: give fractions"),
        ((0.8, 0.5), "that rise"),
        ((0.5, 0.5), "that rise"),
        ((0.0, 0.5), "that rise"),
        ((50, 80), "that rise"),
        ((0.5, 0.9), "ends with 0.9, but the pruning with 0.8"),
    ],
)
def test_wrong_levels_are_refused_when_it_is_made(levels, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        FamilyCallback(PruningCallback(0.8), folder=tmp_path, levels=levels)


@pytest.mark.parametrize(
    ("pruning", "message"),
    [
        (0.8, "`pruning` is a float, which logs no `sparsity`: pass the PruningCallback"),
        (StructuredPruningCallback(ffn=0.5), "`pruning` is a StructuredPruningCallback"),
    ],
)
def test_what_does_not_prune_weights_is_refused_when_it_is_made(pruning, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        FamilyCallback(pruning, folder=tmp_path)


def test_a_training_without_the_pruning_is_refused_before_the_first_step(tmp_path):
    run = trainer(tmp_path)
    run.remove_callback(PruningCallback)
    with pytest.raises(ValueError, match=r"not in the training.*callbacks=\[pruning, family\]"):
        run.train()
    assert run.state.global_step == 0


def test_a_training_without_evaluations_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`eval_strategy`"):
        trainer(tmp_path, eval_strategy="no").train()
    assert not (tmp_path / "family").exists()
