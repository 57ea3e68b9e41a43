"""What is wrong with the launch and with folders, told before any work."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path

from accelerate import PartialState
from safetensors import SafetensorError, safe_open


def check_ranks() -> None:
    """Raises ValueError where several processes were launched that did not find each other."""
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched > 1 and PartialState().num_processes == 1:
        raise ValueError(
            f"{launched} processes were launched, but each would train alone. On CPU pass --use_cpu."
        )


def check_folder(folder: str | None) -> None:
    """Raises ValueError where `folder` cannot be written to, before any work is done for it."""
    if folder is None:
        raise ValueError("pass `output_dir`: the folder for the model.")
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".write-test-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"cannot write to output_dir {folder!r}: {error.strerror}.") from None


def check_checkpoint(folder: str) -> None:
    """Raises ValueError where a checkpoint to resume from lacks a file or has a broken one."""
    if not (Path(folder) / "trainer_state.json").is_file():
        raise ValueError(f"no checkpoint to resume from at {folder!r}: it has no trainer_state.json.")
    for file in sorted(Path(folder).rglob("*")):
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, framework="pt"):
                    pass
            elif file.suffix == ".json":
                json.loads(file.read_text(encoding="utf-8"))
            elif file.suffix in (".pt", ".pth", ".bin") and not zipfile.is_zipfile(file):
                raise ValueError("no zip archive, as torch.save writes it")
        except (SafetensorError, ValueError) as error:
            raise ValueError(
                f"{file} is damaged ({error}): resume from an earlier checkpoint, or begin anew."
            ) from None
