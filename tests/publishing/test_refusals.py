"""What `publish` refuses, before any work where it can know."""

import pytest
import torch
from publishing.runs import never, settings
from tiny import classification_rows, tiny_bert
from transformers import Trainer, TrainerCallback

from hf_compress import PruningCallback, publish
from hf_compress.publishing.destination import PushError


def test_files_that_are_denser_than_asked_are_refused(trained, tmp_path):
    name = read_targets(trained)[0]
    weight = trained.model.get_parameter(name)
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.copy_(torch.where(weight == 0, 1e-3, weight))
        with pytest.raises(ValueError, match="denser than asked"):
            publish(trained, folder=tmp_path / "out")
    finally:
        with torch.no_grad():
            weight.copy_(kept)
    assert list(tmp_path.iterdir()) == []


def read_targets(trainer):
    (pruning,) = [c for c in trainer.callback_handler.callbacks if isinstance(c, PruningCallback)]
    return list(pruning.describe()["weights"])


class StopsEarly(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 8


@pytest.mark.parametrize("sparsity", [0.8, {"attention": 0.8, "re:intermediate|output": 0.5}])
def test_a_training_that_ended_before_its_schedule_is_refused(sparsity, tmp_path):
    trainer = Trainer(
        tiny_bert(),
        settings(tmp_path / "run"),
        train_dataset=classification_rows(16),
        callbacks=[PruningCallback(sparsity, end=16), StopsEarly()],
    )
    trainer.train()
    with pytest.raises(ValueError, match="denser than asked"):
        publish(trainer, folder=tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"repo_id": "me/x"}, PushError, "me/x cannot be pushed with HF_HUB_OFFLINE=1"),
        ({"repo_id": "me/x", "create_pr": True, "revision": "y"}, ValueError, "leave one of them out"),
        ({"private": True}, ValueError, "pass a `repo_id`"),
        ({"folder": None}, ValueError, "Where to"),
        ({"repo_id": "/tmp/model/x"}, ValueError, "'repo_name' or 'namespace/repo_name'"),
        ({"repo_id": "my model"}, ValueError, "'my model'"),
        ({"license": "my-own"}, ValueError, "no identifier of the Hub"),
        ({"license": "other"}, ValueError, "license_name"),
        ({"license_name": "Mine"}, ValueError, "license='other'"),
        ({"baseline": torch.nn.Linear(1, 1)}, TypeError, "`baseline` must be a Transformers model"),
        ({"source": torch.nn.Linear(1, 1)}, TypeError, "`source` must be a Transformers model"),
    ],
)
def test_wrong_arguments_are_refused_before_any_work(arguments, error, message, tmp_path):
    arguments = {"source": tiny_bert(), "folder": tmp_path / "out", "evaluate": never} | arguments
    with pytest.raises(error, match=message):
        publish(arguments.pop("source"), arguments.pop("repo_id", None), **arguments)
    assert list(tmp_path.iterdir()) == []


def test_the_compressed_model_is_no_baseline_and_unknown_metrics_are_named(tmp_path):
    model = tiny_bert()
    with pytest.raises(ValueError, match="the compressed model itself"):
        publish(model, folder=tmp_path / "out", baseline=model)
    with pytest.raises(ValueError, match=r"'f1' is none of \['accuracy'\]"):
        publish(model, folder=tmp_path / "out", evaluate=lambda _: {"accuracy": 1.0}, metric="f1")
