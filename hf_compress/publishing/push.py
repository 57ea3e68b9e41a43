"""A published folder on its way to a Hub: one commit, and a look at what has arrived."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    snapshot_download,
)

from hf_compress.publishing.audit import audit
from hf_compress.publishing.card import render
from hf_compress.publishing.destination import Destination, PushError
from hf_compress.publishing.pictures import PICTURES
from hf_compress.publishing.validate import validate

logger = logging.getLogger(__name__)

MESSAGE = "The compressed model with its report and card"
# Of a training that wrote to the folder too, and whatever is a pickle.
_STAYS = (
    *("*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.npy", "*.npz"),
    *("trainer_state.json", "all_results.json", "train_results.json", "eval_results.json"),
)
_NO_PICKLE = "openvino_*.bin"
_FOLDERS_THAT_STAY = (".*", "_*", "checkpoint-*", "runs", "last-checkpoint")
# Beside the files of a commit these would be read by `from_pretrained`, or tell of an earlier model.
_REPLACED = (
    *("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json"),
    *("adapter_config.json", "generation_config.json", "report.json"),
    *PICTURES,
)
_TEXTS = {".json", ".md", ".txt", ".jinja", ".py", ".yaml", ".yml"}


def push_folder(
    folder: str | Path,
    repo_id: str | None = None,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
    message: str = MESSAGE,
) -> CommitInfo:
    """Sends a folder that `publish` wrote to the Hub in one commit, and reads back what has arrived.

    The files are compared with the report before, and with what a download brings after. Pickles and
    the files of a training stay. What a model left in the repository that was there before, and that
    would be loaded or believed beside this one, is deleted in the same commit. Large files that the
    Hub has already are not sent again, so that a push that failed goes on by calling it again.

    repo_id: by default the name in the card. Under another name the card is written anew.
    private, revision, create_pr, token: see `hf_compress.publishing.destination.Destination`.
    message: of the commit.

    Returns what the Hub says of the commit, or of the last one where nothing has changed.

    Raises FileNotFoundError or ValueError for a folder that is not as `publish` left it, and PushError
    for everything that fails at the Hub or on the way.
    """
    folder = Path(os.path.abspath(folder))
    report = read_report(folder)
    to = Destination(repo_id or report["name"], private, revision, create_pr, token)
    validate(folder)
    _check_weights(folder, report)
    to = to.checked()
    if to.repo_id != report["name"]:
        _rename(folder, report, to.repo_id)
    return send(folder, to, message)


def send(folder: Path, to: Destination, message: str = MESSAGE) -> CommitInfo:
    """`push_folder` of what has been checked. Raises PushError."""
    names = list(published_files(folder))
    _keep_secret(folder, names, to)
    additions = [CommitOperationAdd(name, folder / name) for name in names]
    commit, failure = _commit(folder, additions, to, message)
    try:
        _check_arrived(folder, additions, to, commit)
    except PushError as error:
        # There was another commit, or the answer to ours was lost and then the download failed.
        raise PushError(f"{failure}. {error}") if failure else error from None
    logger.info("%s is at %s", to.repo_id, commit.pr_url or commit.commit_url)
    return commit


def published_files(folder: Path) -> Iterator[str]:
    """The files of `folder` that are to be published, by their path in it."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        hidden = any(fnmatch(part, stays) for part in name.parts for stays in _FOLDERS_THAT_STAY)
        stays = any(fnmatch(path.name, pattern) for pattern in _STAYS)
        if path.is_file() and not hidden and (not stays or fnmatch(path.name, _NO_PICKLE)):
            yield name.as_posix()


def read_report(folder: Path) -> dict[str, Any]:
    """`report.json` of `folder`. Raises FileNotFoundError or ValueError."""
    try:
        report: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{folder} has no report.json: only what `publish` wrote can be pushed. For any model: "
            f"publish(model, folder={str(folder)!r})."
        ) from None
    return report


def _commit(
    folder: Path, additions: list[CommitOperationAdd], to: Destination, message: str
) -> tuple[CommitInfo, str | None]:
    """The commit; and the failure that was the answer, where something was committed in spite of it."""
    api, parent, made = to.api, None, False
    try:
        if not to.create_pr:
            made = to.info() is None
            api.create_repo(to.repo_id, private=to.private, exist_ok=True)
            if to.revision is not None and not to.revision.startswith("refs/"):
                api.create_branch(to.repo_id, branch=to.revision, exist_ok=True)
        parent = to.head()
        there = api.list_repo_files(to.repo_id, revision=parent)
        ours = [addition.path_in_repo for addition in additions]
        commit = api.create_commit(
            to.repo_id,
            [*additions, *(CommitOperationDelete(name) for name in _stale(there, ours))],
            commit_message=message,
            revision=to.revision,
            create_pr=to.create_pr,
            # Whoever commits meanwhile is not written over.
            parent_commit=parent,
        )
        return commit, None
    except KeyboardInterrupt:
        logger.warning("Interrupted. %s", _outlook(folder, to, parent, made))
        raise
    except Exception as error:
        landed = _landed(to, parent)
        if landed is not None:
            # The answer was lost, but perhaps not the commit: the download will tell.
            return landed, to.reason(error)
        # The cause may hold the token in its text.
        raise PushError(f"{to.reason(error)}. {_outlook(folder, to, parent, made)}") from None


def _landed(to: Destination, parent: str | None) -> CommitInfo | None:
    """The commit that has happened since `parent`, where one has."""
    if parent is None or to.create_pr:
        return None
    try:
        head = to.head()
    except Exception:
        return None
    if head is None or head == parent:
        return None
    url = f"{to.api.endpoint}/{to.repo_id}/commit/{head}"
    return CommitInfo(url, MESSAGE, "", head, _endpoint=to.api.endpoint)


def _outlook(folder: Path, to: Destination, parent: str | None, made: bool) -> str:
    """What is on the Hub after a failure, and how to go on."""
    try:
        unchanged = parent is None or to.head() == parent
        state = f"{to.repo_id} is as it was before" if unchanged else f"{to.repo_id} has changed"
        if made and unchanged:
            state = f"{to.repo_id} was made and is empty" if to.info() else f"{to.repo_id} was not made"
        if to.create_pr:
            state += ", unless a pull request was opened"
    except Exception:
        state = f"Whether {to.repo_id} has changed is not known: the Hub does not answer"
    return f"{state}. The model is whole in {folder}; to go on: {to.call(folder)}"


def _check_arrived(
    folder: Path, additions: list[CommitOperationAdd], to: Destination, commit: CommitInfo
) -> None:
    """Downloads what was pushed, compares each file, and audits the weights."""
    url = commit.pr_url or commit.commit_url
    if commit.pr_revision is not None:
        # Another call with create_pr=True would open a second one.
        to = Destination(to.repo_id, to.private, commit.pr_revision, token=to.token)
    revision = commit.pr_revision or commit.oid
    names = [addition.path_in_repo for addition in additions]
    try:
        with TemporaryDirectory(dir=folder.parent, prefix=".") as place:
            snapshot_download(
                to.repo_id, revision=revision, local_dir=place, token=to.token, allow_patterns=names
            )
            # The client knows the sums of what it sent.
            wrong = [
                addition.path_in_repo
                for addition in additions
                if _sum(Path(place, addition.path_in_repo)) != addition.upload_info.sha256.hex()
            ]
            if not wrong:
                _check_weights(Path(place), read_report(Path(place)))
    except KeyboardInterrupt:
        logger.warning("Interrupted. %s has the commit; it was not read back.", url)
        raise
    except Exception as error:
        raise PushError(
            f"{url} has the commit, but it could not be read back: {to.reason(error)}. To look again: "
            f"{to.call(folder)}"
        ) from None
    if wrong:
        raise PushError(
            f"{url} is not what is in {folder}: {', '.join(wrong[:5])} came back otherwise. Was there "
            f"another commit meanwhile? To send it again: {to.call(folder)}"
        )


def _check_weights(folder: Path, report: Mapping[str, Any]) -> None:
    """Raises ValueError where the files of `folder` are not those that the report tells of."""
    told = report["audit"]
    packed = report["integers"] is not None and report["integers"]["format"] != "dense"
    # Of packed integers the report tells the weights that they stand for, and the size of the files.
    found = audit(folder, targets=() if packed else told["targets"])
    same = found.file_bytes == told["file_bytes"] and list(found.files) == told["files"]
    if not packed:
        same = same and json.loads(json.dumps(found.to_dict())) == told
    if not same:
        raise ValueError(
            f"The weights in {folder} are not those that report.json tells of: publish the model again."
        )


def _sum(path: Path) -> str | None:
    if not path.is_file():
        return None
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def _stale(there: Iterable[str], ours: Iterable[str]) -> list[str]:
    ours = set(ours)
    return [
        name
        for name in there
        if name not in ours
        and PurePosixPath(name).name == name
        and any(fnmatch(name, pattern) for pattern in _REPLACED)
    ]


def _keep_secret(folder: Path, names: Iterable[str], to: Destination) -> None:
    secret = to.secret()
    for name in names:
        path = folder / name
        if secret and path.suffix in _TEXTS and secret.encode() in path.read_bytes():
            raise PushError(f"Nothing was sent: {path} has your token in it. Take it out.")


def _rename(folder: Path, report: dict[str, Any], name: str) -> None:
    """Writes the card and the report of `folder` under another name."""
    card, pictures = folder / "README.md", [path.name for path in folder.glob("*.png")]
    if card.read_text(encoding="utf-8") != render(report, pictures=pictures):
        raise ValueError(
            f"The card of {folder} is for {report['name']!r} and was changed by hand: push it under "
            f"that name, or write {name!r} into it and into report.json."
        )
    report["name"] = name
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    card.write_text(render(report, pictures=pictures), encoding="utf-8")
    validate(folder)
