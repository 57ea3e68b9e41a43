"""From a published folder to a Hub, by the real client: one commit, and only what belongs there."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub.client import environment
from hub.server import OWNER, STRANGER, Hub
from publishing.runs import IDS, read

from hf_compress.publishing.push import published_files
from hf_compress.publishing.recipe import recipe_of
from hf_compress.publishing.validate import validate

PUSH = """
from hf_compress.publishing.push import push_folder
commit = push_folder(folder, repo, **options)
result = [commit.oid, commit.pr_url]
"""
LOAD = """
import torch
from transformers import AutoModelForSequenceClassification
model = AutoModelForSequenceClassification.from_pretrained(repo, revision=revision)
result = model(torch.tensor(ids)).logits.tolist()
"""
EARLIER = """
from huggingface_hub import HfApi
api = HfApi()
api.create_repo(repo)
api.upload_folder(repo_id=repo, folder_path=folder)
"""


def push(client, folder, repo="me/tiny-sparse80", **options):
    return client.run(PUSH, folder=folder, repo=repo, options=options)


def head(hub, repo, revision="main"):
    return hub.store.repositories[repo].at(revision)


@pytest.fixture
def folder(published, tmp_path):
    """A copy of the published one, to be changed."""
    return shutil.copytree(published, tmp_path / "tiny")


def test_one_commit_has_all_that_was_published_and_nothing_else(hub, client, trained, folder):
    names = {file.name for file in folder.iterdir()}
    (folder / "checkpoint-4").mkdir()
    for stray in ("training_args.bin", "optimizer.pt", "checkpoint-4/model.safetensors", ".hidden"):
        (folder / stray).write_bytes(b"of the training")
    push(client, folder)
    assert hub.store.files("me/tiny-sparse80") == names
    for name in names:
        assert hub.store.read("me/tiny-sparse80", name) == (folder / name).read_bytes()
    assert len(hub.requests("commit")) == 1
    assert "model.safetensors: 100%" in client.said  # the bar of the upload
    logits = client.run(LOAD, repo="me/tiny-sparse80", revision="main", ids=IDS.tolist())
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(logits), trained.model.eval()(input_ids=IDS).logits)
    # Again, with one change.
    first = head(hub, "me/tiny-sparse80")
    with (folder / "README.md").open("a") as card:
        card.write("\nWritten by hand.\n")
    hub.forgive()
    push(client, folder)
    changed = {n: b for n, b in head(hub, "me/tiny-sparse80").files.items() if b != first.files[n]}
    assert changed.keys() == {"README.md"}
    assert hub.requests("upload") == []
    # And without one: no commit.
    hub.forgive()
    assert push(client, folder) == [head(hub, "me/tiny-sparse80").oid, None]
    assert hub.requests("commit") == []


def test_what_an_earlier_model_left_does_not_stay_beside_it(hub, client, folder, tmp_path):
    earlier = tmp_path / "earlier"
    (earlier / "images").mkdir(parents=True)
    stays = {"LICENSE", "images/layers.png", "notes.md"}
    goes = {"model-00001-of-00002.safetensors", "model.safetensors.index.json", "training_args.bin"}
    goes |= {"adapter_config.json", "adapter_model.safetensors", "pytorch_model.bin", "codes.png"}
    for name in stays | goes:
        (earlier / name).write_bytes(name.encode())
    client.run(EARLIER, repo="me/reused", folder=earlier)
    push(client, folder, "me/reused")
    assert hub.store.files("me/reused") == stays | set(published_files(folder))
    logits = client.run(LOAD, repo="me/reused", revision="main", ids=IDS.tolist())
    assert len(logits[0]) == 3


def test_a_private_model_is_never_seen_by_others(hub, client, folder):
    push(client, folder, "me/secret", private=True)
    assert hub.store.repositories["me/secret"].private
    push(client, folder, "me/open")
    (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")
    before = head(hub, "me/open")
    with pytest.raises(RuntimeError, match="PushError: me/open is there and public"):
        push(client, folder, "me/open", private=True)
    assert head(hub, "me/open") == before
    # The privacy of one that is there is left as it is.
    push(client, folder, "me/secret")
    assert hub.store.repositories["me/secret"].private


def test_a_revision_and_a_pull_request_leave_the_main_branch_alone(hub, client, folder):
    push(client, folder, "me/branched", revision="small")
    assert hub.store.files("me/branched") == set()
    assert hub.store.files("me/branched", "small") == set(published_files(folder))
    logits = client.run(LOAD, repo="me/branched", revision="small", ids=IDS.tolist())
    assert len(logits[0]) == 3
    _, url = push(client, folder, "me/branched", create_pr=True, token=STRANGER)
    assert url.endswith("/me/branched/discussions/1")
    assert hub.store.files("me/branched") == set()
    assert hub.store.files("me/branched", "refs/pr/1") == set(published_files(folder))
    # It can be added to.
    (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")
    push(client, folder, "me/branched", revision="refs/pr/1")
    assert set(hub.store.repositories["me/branched"].heads) == {"main", "small", "refs/pr/1"}
    with pytest.raises(RuntimeError, match="me/none is not there"):
        push(client, folder, "me/none", create_pr=True)


def test_under_another_name_the_card_is_written_anew(hub, client, folder):
    push(client, folder, "other")
    card = hub.store.read("me/other", "README.md").decode()
    assert 'from_pretrained("me/other")' in card
    assert "tiny-sparse80" not in card
    assert read(folder)["name"] == "me/other"
    validate(folder)
    with (folder / "README.md").open("a") as file:
        file.write("\nWritten by hand.\n")
    with pytest.raises(RuntimeError, match="ValueError: .* was changed by hand"):
        push(client, folder, "me/third")
    assert "me/third" not in hub.store.repositories


def damage_weights(folder):
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-400:] = bytes(400)
    path.write_bytes(content)


def damage_card(folder):
    path = folder / "README.md"
    path.write_text(path.read_text().replace("| parameters | ", "| parameters | 1", 1))


def leak(folder):
    (folder / "notes.txt").write_text(f"my token is {STRANGER}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (damage_weights, "are not those that report.json tells of"),
        (damage_card, "parameters is"),
        (leak, "notes.txt has your token in it"),
        (lambda folder: (folder / "report.json").unlink(), "has no report.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "neither model.safetensors nor"),
    ],
)
def test_a_folder_that_is_not_as_it_was_published_is_not_sent(change, message, hub, client, folder):
    change(folder)
    with pytest.raises(RuntimeError, match=message):
        push(client, folder, "me/damaged", token=STRANGER)
    assert not hub.requests("commit")
    assert not hub.requests("create")


def test_a_client_with_xet_pushes_what_travels_in_the_commit(folder, tmp_path):
    with Hub(tmp_path / "hub", only_regular=True) as hub:
        code = f"folder, repo, options = {str(folder)!r}, 'me/tiny-sparse80', {{}}\n{PUSH}"
        env = environment(hub.url, tmp_path / "home", OWNER)
        del env["HF_HUB_DISABLE_XET"]
        subprocess.run([sys.executable, "-c", code], env=env, check=True, capture_output=True)
        assert hub.requests("upload") == []
        assert len(hub.requests("commit")) == 1
        for name in published_files(folder):
            assert hub.store.read("me/tiny-sparse80", name) == (folder / name).read_bytes()


def test_publish_does_it_in_one_call_and_a_bare_name_is_the_users(hub, client):
    code = """
from tiny import tiny_bert
from hf_compress import publish
result = publish(tiny_bert(), "straight", private=True)
result = [str(result), result.is_dir()]
"""
    path, there = client.run(code)
    assert there
    assert path.endswith("/straight")
    assert hub.store.repositories["me/straight"].private
    assert 'from_pretrained("me/straight")' in hub.store.read("me/straight", "README.md").decode()
    assert [seen.route for seen in hub.log].count("commit") == 1


SHARDED = """
from tiny import tiny_bert
from hf_compress import publish
from transformers import BertForSequenceClassification

class Sharded(BertForSequenceClassification):
    def save_pretrained(self, folder, **options):
        super().save_pretrained(folder, max_shard_size="40KB", **options)

torch = __import__("torch")
model = tiny_bert()
model.__class__ = Sharded
Sharded.__name__ = "BertForSequenceClassification"
publish(model, "me/sharded", folder="sharded")
result = model.eval()(torch.tensor(ids)).logits.tolist()
"""
PACKED = """
from transformers import AutoModelForSequenceClassification
from hf_compress import load_quantized, publish
from tiny import tiny_bert

tiny_bert(hidden=64).save_pretrained("dense")
torch = __import__("torch")
model = load_quantized("dense", 4, AutoModelForSequenceClassification)
publish(model, "me/packed", folder="packed")
result = model.eval()(torch.tensor(ids)).logits.tolist()
"""


@pytest.mark.parametrize(("code", "name"), [(SHARDED, "sharded"), (PACKED, "packed")])
def test_shards_and_packed_weights_arrive_too(code, name, hub, client):
    if name == "packed":
        pytest.importorskip("bitsandbytes")
    expected = client.run(code, ids=IDS.tolist())
    found = client.run(LOAD, repo=f"me/{name}", revision="main", ids=IDS.tolist())
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected))
    weights = [path for path in hub.store.files(f"me/{name}") if path.endswith(".safetensors")]
    assert (len(weights) > 1) == (name == "sharded")


def test_a_token_of_the_command_line_is_not_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "__main__", sys.modules[__name__])  # a worker has no program
    monkeypatch.setattr(sys, "argv", ["train.py", "--hub_token", OWNER, f"--token={OWNER}", "--push"])
    assert recipe_of(None).command.endswith(" --hub_token [token] --token=[token] --push")


READER = """
from publishing.runs import score, settings, tokenizer
from tiny import classification_rows, tiny_bert
from transformers import Trainer
from hf_compress import PruningCallback

dense_model, data = tiny_bert(seed=1), classification_rows(16)
trainer = Trainer(
    tiny_bert(),
    settings("run", steps=4),
    train_dataset=data,
    eval_dataset=data,
    compute_metrics=score,
    processing_class=tokenizer(),
    callbacks=[PruningCallback(0.5, end=2)],
)
trainer.train()
"""


def test_the_readme_pushes(hub, client):
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (block,) = [b for b in readme.split("```python\n") if "private=True" in b.split("```")[0]]
    client.run(READER + block.split("```")[0])
    card = hub.store.read("me/minilm-r8-sparse", "README.md").decode()
    assert "recovery" in card
    assert "reuters-r8" in card
    assert hub.store.repositories["me/minilm-r8-sparse"].private
