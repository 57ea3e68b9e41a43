"""What ReportCallback counts reaches the history and a real reporter; its pictures are whole."""

import pytest
import torch
from publishing.runs import score, settings
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import classification_rows, tiny_bert
from transformers import Trainer

from hf_compress import (
    DistillationArguments,
    DistillationTrainer,
    PruningCallback,
    QuantizationCallback,
    ReportCallback,
)

PNG = b"\x89PNG\r\n\x1a\n"


def counted(model):
    weights = list(model.parameters())
    nonzeros = sum(int((weight != 0).sum()) for weight in weights)
    return nonzeros, 1 - nonzeros / sum(weight.numel() for weight in weights)


def distilling(folder, report, *callbacks, **arguments):
    return DistillationTrainer(
        tiny_bert(),
        settings(folder, DistillationArguments, steps=8, eval_strategy="steps", **arguments),
        teacher=tiny_bert(seed=1),
        train_dataset=classification_rows(),
        eval_dataset=classification_rows(16, seed=1),
        compute_metrics=score,
        callbacks=[*callbacks, report],
    )


def test_tensorboard_sees_sizes_sparsity_losses_and_agreement(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    report = ReportCallback()
    callbacks = PruningCallback(0.5, end=4), QuantizationCallback(8, end=4)
    trainer = distilling(tmp_path / "run", report, *callbacks)
    trainer.args.report_to = ["tensorboard"]
    reporter = pytest.importorskip("transformers.integrations").TensorBoardCallback()
    trainer.add_callback(reporter)
    report.attach(trainer)
    trainer.train()
    nonzeros, sparsity = counted(trainer.model)
    last = [row for row in trainer.state.log_history if "loss" in row][-1]
    assert last["nonzeros"] == nonzeros
    assert last["sparsity_overall"] == pytest.approx(sparsity)
    assert last["sparsity"] == pytest.approx(0.5, abs=1e-3)
    size = sum(t.nbytes for t in (*trainer.model.parameters(), *trainer.model.buffers()))
    assert last["megabytes"] == pytest.approx(size / 1e6)
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    tags = set(events.Tags()["scalars"])
    for name in ("nonzeros", "sparsity", "sparsity_overall", "megabytes", "bits"):
        assert f"train/{name}" in tags
        assert events.Scalars(f"train/{name}")[-1].value == pytest.approx(last[name], rel=1e-6)
    assert {"train/loss", "train/loss_task", "train/loss_kd", "train/agreement"} <= tags
    assert {"eval/accuracy", "eval/agreement", "eval/loss_kd"} <= tags
    ramp = [event.value for event in events.Scalars("train/sparsity")]
    assert ramp[0] < ramp[-1]


def test_without_attaching_the_history_has_it_and_reporters_do_not(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    args = settings(tmp_path / "run", steps=4)
    args.report_to = ["tensorboard"]
    trainer = Trainer(
        tiny_bert(), args, train_dataset=classification_rows(), callbacks=[ReportCallback()]
    )
    trainer.train()
    assert all("nonzeros" in row for row in trainer.state.log_history)
    tags = EventAccumulator(str(tmp_path / "events")).Reload().Tags()["scalars"]
    assert "train/loss" in tags
    assert "train/nonzeros" not in tags


def test_pictures_are_drawn_at_the_end_and_those_of_an_earlier_training_go(tmp_path):
    distilling(tmp_path, ReportCallback(), PruningCallback(0.5, end=4)).train()
    pictures = {path.name for path in tmp_path.glob("*.png")}
    assert pictures == {"sparsity.png", "layers.png"}
    assert all((tmp_path / name).read_bytes().startswith(PNG) for name in pictures)
    # Nothing is pruned here, and what is left of a working folder would be pushed.
    distilling(tmp_path, ReportCallback()).train()
    assert {path.name for path in tmp_path.iterdir()} == {"sparsity.png"}


def test_a_picture_that_cannot_be_written_stops_no_training(tmp_path, caplog):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "sparsity.png").mkdir()
    trainer = distilling(tmp_path / "run", ReportCallback())
    trainer.train()
    assert trainer.state.global_step == 8
    assert "pictures of the training were not drawn" in caplog.text


def test_a_push_in_training_has_the_pictures_of_its_step(tmp_path):
    report = ReportCallback()
    trainer = distilling(tmp_path, report, PruningCallback(0.5, end=4))
    seen = []

    def push(step):
        trainer.callback_handler.on_push_begin(trainer.args, trainer.state, trainer.control)
        seen.append((step, {path.name for path in tmp_path.glob("*.png")}))

    class Pushes(type(report)):
        def on_save(self, args, state, control, **kwargs):
            push(state.global_step)

    trainer.add_callback(Pushes())
    trainer.args.save_strategy, trainer.args.save_steps = "steps", 2
    trainer.train()
    assert seen[-1][1] == {"sparsity.png", "layers.png"}
    assert len(seen) == 4
    assert torch.is_grad_enabled()
