"""What was exported of a published model, in its report and on its card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_compress.publishing.card import render
from hf_compress.publishing.validate import validate


def check_card(folder: Path) -> None:
    """Raises ValueError where `folder` has a card that is not as its report says, and would be written
    over; nothing where it has no report."""
    if not (folder / "report.json").is_file():
        return
    report, pictures = _read(folder)
    if (folder / "README.md").read_text(encoding="utf-8") != render(report, pictures=pictures):
        raise ValueError(
            f"The card in {folder} was changed by hand, or written by another version: publish the "
            "model again, or export a copy of the folder without report.json."
        )


def add_export(folder: Path, name: str, measured: Mapping[str, Any]) -> None:
    """Writes what was `measured` of the export in `folder / name` to the report and the card of
    `folder`, in place of an earlier one of that name; nothing where it has no report.

    Raises ValueError where the card would not be true or valid.
    """
    if not (folder / "report.json").is_file():
        return
    report, pictures = _read(folder)
    report["exports"] = {**report.get("exports", {}), name: dict(measured)}
    written = json.dumps(report, indent=1) + "\n"
    (folder / "report.json").write_text(written, encoding="utf-8")
    card = render(json.loads(written), pictures=pictures)
    (folder / "README.md").write_text(card, encoding="utf-8")
    validate(folder)


def _read(folder: Path) -> tuple[dict[str, Any], list[str]]:
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return report, [path.name for path in folder.glob("*.png")]
