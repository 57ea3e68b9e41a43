"""A folder that is written whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

T = TypeVar("T")


def check_target(folder: Path) -> None:
    """Creates the place beside `folder` to work in, `workplace(folder)`, empty.

    Raises FileExistsError when `folder` holds what `publish` did not write, and OSError with the
    reason when it cannot be written.
    """
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not _is_ours(folder)):
        raise FileExistsError(
            f"{folder} exists and was not written by `publish`: choose another `folder` or empty it."
        )
    try:
        shutil.rmtree(workplace(folder), ignore_errors=True)  # what an interrupted run left
        workplace(folder).mkdir(parents=True)
    except OSError as error:
        raise type(error)(
            error.errno, f"`folder` cannot be written ({error.strerror})", str(folder)
        ) from None


def workplace(folder: Path) -> Path:
    """Where `folder` is prepared: beside it, so that it can be moved into place in one step."""
    return folder.with_name(f".{folder.name}.unfinished")


def move_into_place(folder: Path) -> None:
    """Puts the finished workplace where `folder` is to be, in place of an earlier one."""
    if folder.exists():
        old = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        workplace(folder).rename(folder)
        shutil.rmtree(old)
    else:
        workplace(folder).rename(folder)


def on_main_process(action: Callable[[], T]) -> T | None:
    """Runs `action` on rank 0 only and returns what it returns there, None on the others; where it
    fails, every rank raises, and none waits for ever."""
    state = PartialState()
    failure: Exception | None = None
    done: T | None = None
    if state.is_main_process:
        try:
            done = action()
        except Exception as error:
            failure = error
    message = [None if failure is None else f"{type(failure).__name__}: {failure}"]
    if state.num_processes > 1:
        broadcast_object_list(message)
    if failure is not None:
        raise failure
    if message[0] is not None:
        raise RuntimeError(f"rank 0 failed with {message[0]}")
    return done


def _is_ours(folder: Path) -> bool:
    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        return "hf_compress" in report["environment"]["versions"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
