import math

import pytest
from comparing import assert_equal
from short import arguments
from tiny import classification_rows, tiny_bert
from transformers import Trainer, TrainingArguments

from hf_compress import (
    AnnealingCallback,
    DistillationArguments,
    DistillationTrainer,
    Match,
    PruningCallback,
    StructuredPruningCallback,
)
from hf_compress.schedules import Schedule


def distiller(folder, *callbacks, matches=(), **settings):
    defaults = {"max_steps": 4, "learning_rate": 1e-2, "temperature": 2.0, "alpha": 0.5}
    return DistillationTrainer(
        tiny_bert(initializer_range=0.3),
        arguments(folder, DistillationArguments, **(defaults | settings)),
        train_dataset=classification_rows(),
        teacher=tiny_bert(seed=1, initializer_range=0.3),
        matches=matches,
        callbacks=list(callbacks),
    )


def logs(trainer):
    trainer.train()
    return [row for row in trainer.state.log_history if "loss" in row]


def weights(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def test_alpha_falls_by_hand_and_mixes_the_loss(tmp_path):
    rows = logs(distiller(tmp_path, AnnealingCallback(alpha=(0.9, 0.1))))
    assert [row["alpha"] for row in rows] == pytest.approx([0.9, 0.7, 0.5, 0.3])
    for row in rows:
        expected = (1 - row["alpha"]) * row["loss_task"] + row["alpha"] * row["loss_kd"]
        assert row["loss"] == pytest.approx(expected, rel=1e-5)


def test_each_step_has_the_temperature_of_its_schedule(tmp_path):
    still = {"learning_rate": 0.0}
    course = Schedule(initial=8.0, final=1.0, shape="cosine", start=1, end=3)
    rows = logs(distiller(tmp_path, AnnealingCallback(temperature=course), **still))
    assert [row["temperature"] for row in rows] == pytest.approx([8.0, 8.0, 4.5, 1.0])
    for number, row in enumerate(rows):
        constant = logs(distiller(tmp_path, temperature=row["temperature"], **still))
        assert row["loss_kd"] == pytest.approx(constant[number]["loss_kd"], rel=1e-5)


def test_the_weight_of_a_match(tmp_path):
    trainer = distiller(
        tmp_path, AnnealingCallback(weights={"hidden": (0.0, 2.0)}), matches=Match("hidden", weight=3.0)
    )
    rows = logs(trainer)
    assert [row["weight_hidden"] for row in rows] == pytest.approx([0.0, 0.5, 1.0, 1.5])
    assert "loss_hidden" not in rows[0]
    for row in rows[1:]:
        expected = 0.5 * row["loss_task"] + 0.5 * row["loss_kd"]
        expected += row["weight_hidden"] * row["loss_hidden"]
        assert row["loss"] == pytest.approx(expected, rel=1e-5)
    assert trainer.matching.weights == {"hidden": 3.0}


def test_what_stays_as_it_is_changes_nothing(tmp_path):
    plain = distiller(tmp_path)
    annealed = distiller(tmp_path, AnnealingCallback(alpha=(0.5, 0.5), temperature=(2.0, 2.0)))
    for trainer in (plain, annealed):
        trainer.train()
    assert_equal(weights(annealed), weights(plain))


def test_evaluations_and_arguments_stay_as_given(tmp_path):
    trainer = distiller(tmp_path, AnnealingCallback(alpha=(0.9, 0.1), temperature=(8.0, 1.0)))
    before = trainer.args.to_dict()
    trainer.train()
    assert trainer.args.to_dict() == before
    found = trainer.evaluate(classification_rows(rows=16))
    expected = 0.5 * found["eval_loss_task"] + 0.5 * found["eval_loss_kd"]
    assert found["eval_loss"] == pytest.approx(expected)
    assert "alpha" not in trainer.state.log_history[-1]


def test_accumulated_batches_share_the_values_of_their_step(tmp_path):
    annealing = {"alpha": (0.9, 0.1), "temperature": (8.0, 1.0)}
    whole = logs(distiller(tmp_path, AnnealingCallback(**annealing), learning_rate=0.0))
    cut = logs(
        distiller(
            tmp_path,
            AnnealingCallback(**annealing),
            learning_rate=0.0,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=4,
        )
    )
    for ours, theirs in zip(cut, whole, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)


def test_alpha_grows_with_the_sparsity(tmp_path):
    pruning = PruningCallback(sparsity=0.8, interval=1, end=6)
    rows = logs(
        distiller(tmp_path, pruning, AnnealingCallback(alpha=(0.2, 1.0), follow=pruning), max_steps=10)
    )
    sparsities = [0.0, *(row["sparsity"] for row in rows[:-1])]
    for row, sparsity in zip(rows, sparsities, strict=True):
        assert row["alpha"] == pytest.approx(0.2 + 0.8 * sparsity / 0.8, abs=1e-4)  # whole weights
    assert rows[-1]["alpha"] == 1.0


@pytest.mark.parametrize("followed", [False, True])
def test_resuming_equals_never_having_stopped(tmp_path, followed):
    def run(**settings):
        pruning = PruningCallback(sparsity=0.8, interval=1, end=6)
        annealing = AnnealingCallback(
            alpha=(0.2, 1.0),
            temperature=(4.0, 1.0),
            weights={"hidden": (1.0, 0.0)},
            follow=pruning if followed else None,
        )
        # It comes before what it follows.
        return distiller(
            tmp_path, annealing, pruning, matches="distilbert", max_steps=8, save_steps=3, **settings
        )

    whole = run(save_strategy="steps")
    whole.train()
    resumed = run()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_equal(weights(resumed), weights(whole))
    ours, theirs = (
        [row["alpha"] for row in each.state.log_history if "alpha" in row] for each in (resumed, whole)
    )
    assert ours == theirs


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({}, "nothing to anneal"),
        ({"alpha": (0.5, 1.5)}, r"`alpha` goes from 0.5 to 1.5: it is a part of the loss, in \[0, 1\]"),
        ({"alpha": 0.5}, "`alpha` is 0.5: pass the first and the last value"),
        ({"temperature": (2.0, 0.0)}, "`temperature` goes from 2.0 to 0.0: it must stay above 0"),
        ({"temperature": (math.inf, 1.0)}, "it must stay above 0"),
        ({"weights": {"hidden": (1.0, -1.0)}}, "a weight is 0 or more"),
        ({"alpha": (0, 1), "follow": StructuredPruningCallback(ffn=0.5)}, "pass the PruningCallback"),
        (
            {"alpha": Schedule(final=1.0, end=0.5), "follow": PruningCallback(0.5)},
            "alpha has a `start` or an `end`",
        ),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        AnnealingCallback(**wrong)


@pytest.mark.parametrize(
    ("annealing", "message"),
    [
        (
            {"weights": {"hiden": (1.0, 0.0)}},
            "names 'hiden', but the matches of the trainer are 'hidden'",
        ),
        ({"alpha": (0, 1), "follow": PruningCallback(0.5)}, "is not among the callbacks"),
        ({"alpha": Schedule(final=1.0, end=9)}, "ends at step 9, but training ends at step 4"),
    ],
)
def test_what_does_not_fit_the_trainer_is_refused_as_training_begins(tmp_path, annealing, message):
    trainer = distiller(tmp_path, AnnealingCallback(**annealing), matches=Match("hidden"))
    before = weights(trainer)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert_equal(weights(trainer), before)


def test_a_trainer_that_does_not_distil_is_refused(tmp_path):
    callback = AnnealingCallback(alpha=(0, 1))
    trainer = Trainer(
        tiny_bert(), arguments(tmp_path, TrainingArguments), train_dataset=classification_rows()
    )
    with pytest.raises(ValueError, match="Trainer does not distil"):
        callback.attach(trainer)
    trainer.add_callback(callback)
    with pytest.raises(ValueError, match="does not know its trainer"):
        trainer.train()


def test_it_describes_itself():
    described = AnnealingCallback(alpha=(0.9, 0.1), weights={"hidden": (1.0, 0.0)}).describe()
    line = {"schedule": "linear", "start": 0.0, "end": 1.0}
    assert described == {
        "method": "annealing",
        "over": "steps",
        "alpha": {"from": 0.9, "to": 0.1, **line},
        "weight_hidden": {"from": 1.0, "to": 0.0, **line},
    }
