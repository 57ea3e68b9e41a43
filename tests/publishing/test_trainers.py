"""A trainer's own ways to the Hub: what they leave there is true."""

import pytest
from huggingface_hub import ModelCard

from hf_compress.publishing.audit import audit
from hf_compress.publishing.validate import validate

TRAIN = """
from publishing.runs import score, tokenizer
from tiny import classification_rows, tiny_bert
from transformers import Trainer, TrainingArguments
from hf_compress import DistillationArguments, DistillationTrainer, PruningCallback, PublishingMixin

class Publishing(PublishingMixin, Trainer):
    pass

kinds = {"Trainer": Trainer, "Publishing": Publishing, "Distillation": DistillationTrainer}
arguments = DistillationArguments if kind == "Distillation" else TrainingArguments
teacher = {"teacher": tiny_bert(seed=1)} if kind == "Distillation" else {}
args = arguments(
    name,
    max_steps=4,
    save_steps=2,
    logging_steps=1,
    eval_strategy="steps",
    eval_steps=2,
    report_to="none",
    use_cpu=True,
    push_to_hub=True,
    hub_model_id="me/" + name,
    hub_strategy=strategy,
    hub_always_push=True,
)
trainer = kinds[kind](
    tiny_bert(),
    args,
    train_dataset=classification_rows(16),
    eval_dataset=classification_rows(40, seed=1),
    compute_metrics=score,
    processing_class=tokenizer(),
    callbacks=[PruningCallback(0.75, end=4, interval=1)],
    **teacher,
)
trainer.train()
(pruning,) = [c for c in trainer.callback_handler.callbacks if isinstance(c, PruningCallback)]
result = list(pruning.describe()["weights"])
"""


def fetch(hub, name, folder):
    folder.mkdir()
    for path in hub.store.files(name):
        place = folder / path
        place.parent.mkdir(exist_ok=True, parents=True)
        place.write_bytes(hub.store.read(name, path))
    return folder


@pytest.mark.parametrize("kind", ["Trainer", "Publishing", "Distillation"])
@pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "all_checkpoints"])
def test_what_is_pushed_in_training_says_how_far_it_is(kind, strategy, hub, client, tmp_path):
    name = f"{kind}-{strategy}".lower()
    weights = client.run(TRAIN, kind=kind, strategy=strategy, name=name)
    folder = fetch(hub, f"me/{name}", tmp_path / "fetched")
    card = ModelCard.load(folder / "README.md")
    assert "The last checkpoint of a compression" in card.content
    assert "after 4 steps" in card.content
    assert "hf-compress" in card.data.tags
    # The number on it is that of the weights beside it.
    sparsity = audit(folder).sparsity_of(weights)
    assert sparsity == pytest.approx(0.75, abs=1e-3)
    assert f"| sparsity | 4 | {sparsity:.6g} |" in card.content
    earlier = [c for c in hub.store.repositories[f"me/{name}"].commits.values() if "step 2" in c.title]
    text = hub.store.path(earlier[0].files["README.md"].oid).read_text()
    assert "under way, BertForSequenceClassification at step 2 of 4" in text


@pytest.mark.parametrize("kind", ["Publishing", "Distillation"])
def test_what_is_pushed_at_the_end_has_a_measured_card(kind, hub, client, tmp_path):
    name = f"{kind}-end".lower()
    code = """
trainer.push_to_hub(license="mit", dataset="counting")
with open(name + "/README.md") as card:
    result = card.read()
"""
    own = client.run(TRAIN + code, kind=kind, strategy="end", name=name)
    folder = fetch(hub, f"me/{name}", tmp_path / "fetched")
    validate(folder)
    card = ModelCard.load(folder / "README.md")
    assert own == (folder / "README.md").read_text()
    assert card.data.license == "mit"
    assert card.data.datasets == ["counting"]
    assert ("recovery" in card.content.split("## What")[0]) == (kind == "Distillation")
    assert not [path for path in folder.iterdir() if path.suffix in (".bin", ".pt")]
    assert len(hub.requests("commit")) == 1


def test_pickles_of_the_pushes_in_training_go_and_a_push_need_not_wait(hub, client):
    code = """
future = trainer.push_to_hub(blocking=False)
result = future.result().oid
"""
    oid = client.run(TRAIN + code, kind="Distillation", strategy="every_save", name="later")
    commits = hub.store.repositories["me/later"].commits
    assert any("training_args.bin" in commit.files for commit in commits.values())
    assert hub.store.repositories["me/later"].at("main").oid == oid
    assert "training_args.bin" not in hub.store.files("me/later")


def test_to_save_is_to_push_where_the_arguments_say_so(hub, client):
    client.run(TRAIN + "trainer.save_model()", kind="Publishing", strategy="end", name="saved")
    assert "report.json" in hub.store.files("me/saved")
    assert "training_args.bin" not in hub.store.files("me/saved")
