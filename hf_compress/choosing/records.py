"""What was found so far, on disk, so that a run which was stopped goes on where it was."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


class Records:
    """JSON files in `folder`, one for each thing that was measured or trained.

    A file is written beside its place and moved there, so that it is whole or absent. One that is
    damaged all the same is told, and what it held is done again.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def once(
        self,
        name: str,
        make: Callable[[], dict[str, Any]],
        *,
        holds: Callable[[dict[str, Any]], bool] = lambda found: True,
    ) -> dict[str, Any]:
        """What `make` returned the first time under this name.

        holds: whether what was found is still so; where not, it is made again.
        """
        found = self.find(name, holds=holds)
        if found is not None:
            return found
        made = make()
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self._path(name), made)
        return made

    def find(
        self, name: str, *, holds: Callable[[dict[str, Any]], bool] = lambda found: True
    ) -> dict[str, Any] | None:
        """What is kept under this name and still `holds`; else None."""
        found = self._read(self._path(name))
        return found if found is not None and holds(found) else None

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def _read(self, path: Path) -> dict[str, Any] | None:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError:
            found = None
        if not isinstance(found, dict):
            logger.warning("%s is damaged, and what it held is done again.", path)
            return None
        return found


def write_whole(path: Path, content: Mapping[str, Any]) -> None:
    """Writes JSON so that `path` holds all of it or what it held before, even without power."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    with unfinished.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def digest_of(parts: Iterable[bytes]) -> str:
    """A short name for exactly these bytes, however they are cut."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest()[:16]
