"""What the user can put right ends a command with one line; a bug of ours keeps its traceback."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback

GRACE = 20.0  # seconds, for the main process to tell an error that every process met


class UserError(ValueError):
    """Wrong settings, data or files, told so that the user can put them right."""


@contextmanager
def refusing() -> Iterator[None]:
    """Around what comes before the work: there an error of these kinds is a check's refusal."""
    try:
        yield
    except (ValueError, OSError, ImportError, NotImplementedError) as error:
        raise UserError(str(error)) from error


@contextmanager
def refusing_until(first_step: FirstStep) -> Iterator[None]:
    """Around a training: what only it can check (its length, a checkpoint) is refused before a step."""
    try:
        yield
    except ValueError as error:
        if first_step.begun:
            raise
        raise UserError(str(error)) from error


class FirstStep(TrainerCallback):
    """Whether a training got past its checks."""

    begun = False

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.begun = True


def run(command: Callable[[list[str]], None], argv: list[str]) -> None:
    """Runs `command`. A UserError ends the program with status 2 and `error: ...` on stderr."""
    try:
        command(argv)
    except UserError as error:
        if os.environ.get("RANK", "0") != "0":
            # The launcher ends this process once the main one has told the same. Ending first would
            # silence that one; never telling would hide what went wrong on this rank alone.
            time.sleep(GRACE)
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
