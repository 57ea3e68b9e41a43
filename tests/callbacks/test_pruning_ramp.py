"""A ramp that listens to the evaluations, zeros that are only kept, and what is refused of both."""

import json

import pytest
import torch
from short import arguments
from tiny import classification_rows, tiny_bert
from transformers import Trainer, TrainerCallback

from hf_compress import PruningCallback
from hf_compress.schedules import Clock, Drop, clock_of
from hf_compress.targets import find_targets

STEPS = 20


def rows(*values, every=5, name="eval_accuracy"):
    """Logs with an evaluation each `every` steps, and the rows between them."""
    logs = [{"step": 1, "loss": 2.0}]
    for i, value in enumerate(values):
        logs.append({"step": every * (i + 1), name: value})
    return logs


DROP = Drop(metric="accuracy", by=0.1)


def test_without_a_drop_the_clock_is_the_step():
    for history in ([], rows(0.5, 0.45, 0.41, 0.9, 0.8)):
        clock = clock_of(history, hold=DROP, back=None)
        assert [clock.at(step) for step in (25, 26, 40)] == [25, 26, 40]


def test_a_drop_stops_the_clock_until_the_metric_is_back():
    assert clock_of(rows(0.8, 0.6), hold=DROP, back=None) == Clock(time=10, since=10, runs=False)
    assert clock_of(rows(0.8, 0.6), hold=DROP, back=None).at(14) == 10
    clock = clock_of(rows(0.8, 0.6, 0.5, 0.75), hold=DROP, back=None)
    assert [clock.at(step) for step in (20, 21, 30)] == [10, 11, 20]


def test_stepping_back_returns_to_the_last_good_evaluation():
    assert clock_of(rows(0.8, 0.75, 0.6), hold=None, back=DROP).at(17) == 10
    clock = clock_of(rows(0.8, 0.75, 0.6, 0.79), hold=None, back=DROP)
    assert [clock.at(step) for step in (20, 25)] == [10, 15]


def test_a_small_drop_holds_and_a_large_one_steps_back():
    large = Drop(metric="accuracy", by=0.3)
    assert clock_of(rows(0.8, 0.6), hold=DROP, back=large).at(12) == 10
    assert clock_of(rows(0.8, 0.4), hold=DROP, back=large).at(12) == 5


def test_a_loss_drops_upwards():
    drop = Drop(metric="eval_loss", by=0.1)
    assert drop.happened(1.2, [1.0])
    assert not drop.happened(0.5, [1.0])
    assert Drop(metric="loss", by=0.1, greater_is_better=True).happened(0.5, [1.0])
    assert clock_of(rows(1.0, 1.2, name="eval_loss"), hold=drop, back=None).at(13) == 10


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"by": -0.1}, "`by` is -0.1: the drop that is accepted is 0 or more"),
        ({"by": float("nan")}, "`by` is nan"),
        ({"by": "1 %"}, "`by` is '1 %'.*such as 0.01"),
        ({"metric": None}, "`metric` is None: pass its name in the logs"),
    ],
)
def test_wrong_drops_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Drop(**({"metric": "loss", "by": 0.1} | wrong))


class Scripted(Trainer):
    """Evaluates to the next number of a list."""

    values: dict

    def evaluate(self, *args, **kwargs):
        metrics = {"eval_accuracy": self.values[self.state.global_step]}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def trainer(folder, callback, values, model=None, **settings):
    run = Scripted(
        model or tiny_bert(),
        arguments(
            folder,
            max_steps=STEPS,
            learning_rate=1e-2,
            **(
                {"eval_strategy": "steps", "eval_steps": 4, "save_strategy": "steps", "save_steps": 10}
                | settings
            ),
        ),
        train_dataset=classification_rows(),
        eval_dataset=classification_rows(seed=1),
        callbacks=[callback],
    )
    run.values = dict(zip((4, 8, 12, 16, 20), values, strict=True))
    return run


def ramp(run):
    return {row["step"]: row["sparsity"] for row in run.state.log_history if "loss" in row}


def weights(run):
    return torch.cat([p.detach().flatten() for p in find_targets(run.model).parameters.values()])


def callback(**settings):
    return PruningCallback(0.5, schedule="linear", end=10, interval=1, **settings)


def test_a_held_ramp_goes_on_where_it_stood(tmp_path):
    run = trainer(tmp_path, callback(hold_when=DROP), (0.8, 0.6, 0.8, 0.8, 0.8))
    run.train()
    found = ramp(run)
    assert found[8] == pytest.approx(0.4, abs=1e-3)
    assert all(found[step] == found[8] for step in (9, 10, 11, 12))
    assert found[13] == pytest.approx(0.45, abs=1e-3)
    assert found[20] == pytest.approx(0.5, abs=1e-3)


def test_a_ramp_that_steps_back_revives_weights(tmp_path):
    run = trainer(tmp_path, callback(step_back_when=DROP), (0.8, 0.6, 0.8, 0.8, 0.8))
    run.train()
    found = ramp(run)
    assert found[8] == pytest.approx(0.4, abs=1e-3)
    assert found[9] == found[12] == pytest.approx(0.2, abs=1e-3)
    assert found[13] == pytest.approx(0.25, abs=1e-3)
    assert int((weights(run) == 0).sum()) == round(0.5 * len(weights(run)))


@pytest.mark.parametrize("setting", ["hold_when", "step_back_when"])
@pytest.mark.parametrize("pattern", ["unstructured", "4x1"])
def test_resume_within_a_hold_is_bit_equal(tmp_path, setting, pattern):
    settings = {setting: DROP, "pattern": pattern}
    values = (0.8, 0.6, 0.8, 0.8, 0.8)
    whole = trainer(tmp_path, callback(**settings), values)
    whole.train()
    rest = trainer(tmp_path, callback(**settings), values)
    rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert weights(rest).equal(weights(whole))
    assert ramp(rest) == ramp(whole)


def test_a_ramp_that_never_ends_is_told(tmp_path, caplog):
    from transformers.utils import logging as transformers_logging

    transformers_logging.enable_propagation()
    run = trainer(tmp_path, callback(hold_when=DROP), (0.8, 0.6, 0.6, 0.6, 0.6))
    run.train()
    assert "the model is 0.4000 sparse, not 0.5000 as asked: drops of eval_accuracy took" in caplog.text


def test_the_description_tells_what_it_listened_to():
    described = callback(hold_when=DROP).describe()
    assert json.loads(json.dumps(described))["hold_when"]["metric"] == "accuracy"


def test_a_drop_without_evaluations_is_refused(tmp_path):
    run = trainer(tmp_path, callback(hold_when=DROP), (1,) * 5, eval_strategy="no")
    with pytest.raises(ValueError, match="eval_accuracy.*set `eval_strategy`"):
        run.train()


def test_a_metric_that_evaluations_lack_is_told_at_the_first(tmp_path):
    run = trainer(tmp_path, callback(hold_when=Drop(metric="f1", by=0.1)), (1,) * 5)
    with pytest.raises(ValueError, match="no 'eval_f1'; they have.*eval_accuracy"):
        run.train()


def sparse_bert():
    model = tiny_bert()
    with torch.no_grad():
        for param in find_targets(model).parameters.values():
            param.mul_(torch.rand_like(param) < 0.4)
    return model


def test_keep_only_freezes_what_is_zero(tmp_path):
    run = trainer(tmp_path, PruningCallback.keep(), (1,) * 5, sparse_bert())
    before = weights(run).clone()
    seen = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, optimizer=None, **kwargs):
            keys = {str(key) for s in optimizer.optimizer.state.values() for key in s}
            seen.append({key for key in keys if key.startswith("hf_compress")})

    run.add_callback(Look())
    run.train()
    after = weights(run)
    assert (after == 0).equal(before == 0)
    assert not after.equal(before)
    assert set(map(frozenset, seen)) == {frozenset({"hf_compress_mask"})}
    rest = trainer(tmp_path, PruningCallback.keep(), (1,) * 5)
    rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert weights(rest).equal(after)


def test_keep_tells_what_it_will_keep():
    plan = PruningCallback.keep().dry_run(sparse_bert())
    assert plan.zeros == sum(
        int((p == 0).sum()) for p in find_targets(sparse_bert()).parameters.values()
    )


def test_nothing_to_keep_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no zero to keep"):
        trainer(tmp_path, PruningCallback.keep(), (1,) * 5).train()
