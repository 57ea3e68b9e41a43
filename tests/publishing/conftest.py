import pytest
import torch
from hub.fixtures import client, hub, running_hub
from publishing.runs import score, settings, tokenizer
from tiny import classification_rows, tiny_bert

from hf_compress import DistillationArguments, DistillationTrainer, PruningCallback, publish

__all__ = ["client", "hub", "running_hub"]


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A pruned student with its teacher, trained once; the tests only read it."""
    torch.manual_seed(0)
    trainer = DistillationTrainer(
        tiny_bert(),
        settings(tmp_path_factory.mktemp("run"), DistillationArguments),
        teacher=tiny_bert(hidden=64, seed=1),
        train_dataset=classification_rows(),
        eval_dataset=classification_rows(40, seed=1),
        compute_metrics=score,
        processing_class=tokenizer(),
        callbacks=[PruningCallback(0.8, interval=2)],
    )
    trainer.train()
    return trainer


@pytest.fixture(scope="session")
def published(trained, tmp_path_factory):
    return publish(
        trained,
        "me/tiny-sparse80",
        push=False,
        folder=tmp_path_factory.mktemp("hub") / "tiny",
        dataset="counting",
        split="test",
        base_model="org/base",
        license="apache-2.0",
    )
