"""The Hub of the tests, spoken to by the real client."""

import json
import subprocess
import sys

import pytest
import torch
from hub.client import environment
from hub.server import OWNER, STRANGER, Hub
from tiny import tiny_bert

IDS = torch.arange(5, 17)[None]
PUSH = """
from transformers import BertForSequenceClassification
BertForSequenceClassification.from_pretrained(folder).push_to_hub(repo, private=private)
"""
LOAD = """
import torch
from transformers import AutoModelForSequenceClassification
model = AutoModelForSequenceClassification.from_pretrained(repo)
result = model(torch.tensor(ids)).logits.tolist()
"""
FETCH = """
from huggingface_hub import snapshot_download
result = snapshot_download(repo, token=token, local_dir=folder)
"""


@pytest.fixture(scope="module")
def pushed(client, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_bert().save_pretrained(folder)
    client.run(PUSH, folder=folder, repo="me/tiny", private=False)
    return folder


def test_a_model_comes_back_as_it_went(hub, client, pushed, tmp_path):
    for name in ("config.json", "model.safetensors"):
        assert hub.store.read("me/tiny", name) == (pushed / name).read_bytes()
    with torch.no_grad():
        expected = tiny_bert().eval()(IDS).logits
    logits = client.run(LOAD, repo="me/tiny", ids=IDS.tolist())
    torch.testing.assert_close(torch.tensor(logits), expected)
    client.run(FETCH, repo="me/tiny", token=None, folder=tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == (pushed / "model.safetensors").read_bytes()


def forget_weights(hub):
    """So that they have to be uploaded again."""
    hub.store.path(hub.store.repositories["me/tiny"].at("main").files["model.safetensors"].oid).unlink(
        missing_ok=True
    )


def test_of_what_is_pushed_again_only_what_changed_goes(hub, client, pushed):
    config = json.loads((pushed / "config.json").read_text())
    changed = pushed.with_name("changed")
    model = tiny_bert()
    model.config.id2label = {0: "a", 1: "b", 2: "c"}
    model.save_pretrained(changed)
    before = hub.store.repositories["me/tiny"].at("main")
    client.run(PUSH, folder=changed, repo="me/tiny", private=False)
    assert hub.requests("upload") == []
    (commit,) = hub.requests("commit")
    assert commit.size < 3 * len(json.dumps(config))
    after = hub.store.repositories["me/tiny"].at("main")
    assert {path for path in after.files if after.files[path] != before.files.get(path)} == {
        "config.json"
    }


def test_the_private_and_the_gated_are_for_those_who_may(hub, client, pushed, tmp_path):
    client.run(PUSH, folder=pushed, repo="me/secret", private=True)
    client.run(FETCH, repo="me/secret", token=OWNER, folder=tmp_path / "own")
    for token in (False, STRANGER):
        with pytest.raises(RuntimeError, match="RepositoryNotFoundError"):
            client.run(FETCH, repo="me/secret", token=token, folder=tmp_path / "theirs")
    client.run(PUSH, folder=pushed, repo="me/gated", private=False)
    repository = hub.store.repositories["me/gated"]
    repository.gated = True
    with pytest.raises(RuntimeError, match=r"(?s)GatedRepoError.*Access to model me/gated"):
        client.run(FETCH, repo="me/gated", token=STRANGER, folder=tmp_path / "gated")
    repository.readers.add("you")
    client.run(FETCH, repo="me/gated", token=STRANGER, folder=tmp_path / "gated")
    assert (tmp_path / "gated" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("route", "fault", "message"),
    [
        ("create", {"status": 403}, "403 Forbidden"),
        ("preupload", {"status": 400}, "BadRequestError"),
        ("upload", {"status": 400}, "uploading 'model.safetensors'"),
        ("commit", {"status": 409}, "409"),
        ("commit", {"status": 500}, "500"),
        ("commit", {"drop": True}, "disconnected|reset|closed"),
    ],
)
def test_a_failure_leaves_no_commit(route, fault, message, hub, client, pushed):
    name = f"me/{route}-{fault.get('status', 'cut')}"
    forget_weights(hub)
    hub.fail(route, **fault)
    with pytest.raises(RuntimeError, match=message):
        client.run(PUSH, folder=pushed, repo=name, private=False)
    if name in hub.store.repositories:
        assert hub.store.files(name) == set()


def test_what_passes_is_tried_again(hub, client, pushed):
    forget_weights(hub)
    hub.fail("upload", drop=True, after=10_000)
    client.run(PUSH, folder=pushed, repo="me/again", private=False)
    assert [seen.status for seen in hub.requests("upload")] == [0, 200]
    assert (
        hub.store.read("me/again", "model.safetensors") == (pushed / "model.safetensors").read_bytes()
    )


def test_a_client_with_xet_sends_what_is_small_in_the_commit(pushed, tmp_path):
    with Hub(tmp_path / "hub", only_regular=True) as hub:
        code = (
            "from huggingface_hub import HfApi\napi = HfApi()\napi.create_repo('me/x')\n"
            f"api.upload_folder(repo_id='me/x', folder_path={str(pushed)!r})"
        )
        env = environment(hub.url, tmp_path / "home", OWNER)
        del env["HF_HUB_DISABLE_XET"]
        subprocess.run([sys.executable, "-c", code], env=env, check=True, capture_output=True)
        assert hub.requests("upload") == []
        assert (
            hub.store.read("me/x", "model.safetensors") == (pushed / "model.safetensors").read_bytes()
        )
