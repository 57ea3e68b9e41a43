"""What goes wrong on the way to a Hub: nothing is claimed that is not there; the next call goes on."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from hub.client import Client, environment
from hub.server import OWNER

from hf_compress.publishing.push import published_files

PUSH = """
from hf_compress.publishing.push import push_folder
result = push_folder(folder, repo, **options).oid
"""


def push(client, folder, repo, **options):
    return client.run(PUSH, folder=folder, repo=repo, options=options)


@pytest.fixture
def folder(published, tmp_path):
    """A copy of the published one, whose weights no Hub has seen."""
    return shutil.copytree(published, tmp_path / "tiny")


@pytest.fixture
def unseen(hub, folder):
    """The weights were never uploaded."""
    for path in hub.store.root.iterdir():
        if path.stat().st_size == (folder / "model.safetensors").stat().st_size:
            path.unlink()


@pytest.mark.parametrize(
    ("route", "fault", "said", "state"),
    [
        ("whoami", {"status": 401}, "401", None),
        ("whoami", {"drop": True}, "Nothing was sent", None),
        ("create", {"status": 403}, "403 Forbidden", "was not made"),
        ("create", {"status": 409, "message": "taken"}, "", "was not made"),
        ("validate", {"status": 400}, "Invalid metadata in README.md", "is empty"),
        ("preupload", {"status": 400, "message": "too many files"}, "too many files", "is empty"),
        ("batch", {"status": 403}, "403 Forbidden", "is empty"),
        ("upload", {"status": 400, "message": "checksum"}, "checksum", "is empty"),
        ("upload", {"status": 507, "message": "disk is full"}, "disk is full", "is empty"),
        ("verify", {"status": 400}, "uploading 'model.safetensors'", "is empty"),
        ("commit", {"status": 400, "message": "bad pointer"}, "bad pointer", "is empty"),
        ("commit", {"status": 403}, "403 Forbidden", "is empty"),
        ("commit", {"status": 409, "message": "conflict"}, "conflict", "is empty"),
        ("commit", {"status": 500, "message": "oh no"}, "oh no", "is empty"),
        ("commit", {"status": 503}, "503", "is empty"),
        ("commit", {"drop": True, "after": 1000}, "", "is empty"),
    ],
)
def test_a_failure_says_what_happened_and_the_next_call_goes_on(
    route, fault, said, state, hub, client, folder, unseen
):
    repo = f"me/{route}-{'-'.join(map(str, fault.values()))}".replace(" ", "-")
    hub.fail(route, **fault)
    with pytest.raises(RuntimeError, match=r"^PushError: ") as failure:
        push(client, folder, repo)
    message = str(failure.value)
    assert said in message
    assert OWNER not in message
    if state is not None:
        assert state in message
        assert f"push_folder('{folder}', '{repo}')" in message
    if repo in hub.store.repositories:
        assert hub.store.files(repo) == set()
    sent = {seen.path for seen in hub.requests("upload") if seen.status == 200}
    hub.forgive()
    push(client, folder, repo)
    assert hub.store.files(repo) == set(published_files(folder))
    # What has arrived is not sent again.
    assert {seen.path for seen in hub.requests("upload")}.isdisjoint(sent)


@pytest.mark.parametrize(
    ("route", "fault"),
    [
        ("preupload", {"status": 503}),
        ("batch", {"status": 500}),
        ("upload", {"status": 500}),
        ("upload", {"drop": True, "after": 20_000}),
        ("verify", {"lose": True}),
        # The answer is lost, the commit is not: the download tells.
        ("commit", {"lose": True}),
    ],
)
def test_what_passes_is_got_over(route, fault, hub, client, folder, unseen):
    repo = f"me/{route}-{'-'.join(fault)}-passes"
    hub.fail(route, **fault)
    push(client, folder, repo)
    assert hub.store.files(repo) == set(published_files(folder))
    assert len(hub.requests("commit")) == 1
    assert any(seen.status == next(iter(fault.values())) or seen.status == 0 for seen in hub.log)


def test_a_commit_of_someone_else_is_not_written_over(hub, client, folder, unseen):
    push(client, folder, "me/shared")
    (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")
    hub.fail("commit", status=412, message="A commit has happened since")
    with pytest.raises(
        RuntimeError, match=r"A commit has happened since.*me/shared is as it was before"
    ):
        push(client, folder, "me/shared")
    # Between the look at the branch and the commit.
    repository = hub.store.repositories["me/shared"]
    theirs = dict(repository.at("main").files) | {"notes.md": hub.store.add(b"theirs")}
    hub.fail("commit", first=lambda: repository.commit("main", "theirs", theirs))
    with pytest.raises(RuntimeError, match="412.*came back otherwise"):
        push(client, folder, "me/shared")
    assert repository.at("main").files == theirs
    push(client, folder, "me/shared")
    assert "notes.md" in hub.store.files("me/shared")


def test_what_comes_back_otherwise_is_not_claimed(hub, client, folder, unseen):
    push(client, folder, "me/rotten")
    oid = hub.store.repositories["me/rotten"].at("main").files["model.safetensors"].oid
    content = bytearray(hub.store.path(oid).read_bytes())
    content[-4:] = b"oops"
    hub.store.path(oid).write_bytes(content)
    with pytest.raises(RuntimeError, match=r"is not what is in .*: model\.safetensors came back"):
        push(client, folder, "me/rotten")


def test_a_download_that_fails_is_told_apart_from_a_push_that_failed(hub, client, folder, unseen):
    hub.fail("resolve", status=403, times=100)
    with pytest.raises(RuntimeError, match=r"has the commit, but it could not be read back: .*403"):
        push(client, folder, "me/unread")
    hub.forgive()
    push(client, folder, "me/unread")
    assert hub.requests("commit") == []


def test_a_token_is_in_no_error_and_in_no_log(hub, client, folder, unseen):
    link = "https://store/x?X-Amz-Signature=abcdef0123456789"
    hub.fail("batch", status=400, message=f"bad token {OWNER} for {link}")
    with pytest.raises(RuntimeError, match=r"bad token \[token\] for https://store/x\b") as failure:
        push(client, folder, "me/quiet", token=OWNER)
    assert "Signature" not in str(failure.value)
    assert OWNER not in client.said
    result = client.run(
        "from hf_compress.publishing.destination import Destination\n"
        "result = repr(Destination('me/x', token=token))",
        token=OWNER,
    )
    assert OWNER not in result


def test_a_full_disk_stops_it_before_the_push_or_before_it_is_read_back(
    running_hub, folder, tmp_path, unseen
):
    """Files above 50 kB cannot be written: neither the weights nor their download."""
    client = Client(tmp_path / "client", running_hub.url, OWNER)
    limited = """
import resource
from hf_compress.publishing.push import push_folder
from hf_compress import publish
from tiny import tiny_bert
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
try:
    {}
finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
"""
    with pytest.raises(RuntimeError):
        client.run(limited.format('publish(tiny_bert(), "me/unwritten")'))
    assert not (tmp_path / "client" / "unwritten").exists()
    assert "me/unwritten" not in running_hub.store.repositories
    with pytest.raises(RuntimeError, match="has the commit, but it could not be read back"):
        client.run(limited.format('push_folder(folder, "me/full")'), folder=folder)
    push(client, folder, "me/full")
    client.close()


def test_an_interrupt_leaves_no_commit_and_says_how_to_go_on(hub, client, folder, tmp_path, unseen):
    hub.fail("upload", slow=600)
    # A shell that runs the tests in the background has them ignore interrupts, and so their children.
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{heard}\nfolder, repo, options = {str(folder)!r}, 'me/stopped', {{}}\n{PUSH}"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stderr=subprocess.PIPE,
        text=True,
        env=environment(hub.url, tmp_path / "home", OWNER),
    )
    while process.poll() is None and not hub.requests("batch"):
        time.sleep(0.1)
    time.sleep(1)
    os.kill(process.pid, signal.SIGINT)
    said = process.communicate(timeout=300)[1]
    assert "KeyboardInterrupt" in said
    assert f"to go on: push_folder('{folder}', 'me/stopped')" in said
    assert hub.store.files("me/stopped") == set()
    hub.forgive()
    push(client, folder, "me/stopped")
    assert hub.store.files("me/stopped") == set(published_files(folder))
