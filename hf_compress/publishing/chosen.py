"""The card of a model that was chosen among others, with the table that it was chosen by."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_compress.publishing.card import render
from hf_compress.publishing.destination import Destination
from hf_compress.publishing.folder import check_target, move_into_place, workplace
from hf_compress.publishing.pictures import CHOICE, PICTURES
from hf_compress.publishing.push import read_report, send
from hf_compress.publishing.validate import validate

_TOLD = ("sentence", "columns", "table", "limits", "rows", "cautions", "seconds")


def publish_chosen(
    finalist: Path,
    folder: Path,
    choice: Mapping[str, Any],
    picture: Path,
    *,
    name: str,
    to: Destination | None = None,
) -> None:
    """Writes to `folder` what `publish` wrote to `finalist`, with the choice in the report and on the
    card, and sends it `to` a Hub.

    choice: `sentence`, `columns`, `table`, `limits` and `seconds`, as
        `hf_compress.choosing.telling.to_dict` has them; `rows`: what chose and what reports;
        `cautions`: sentences.
    picture: of all that was tried. name: the repository's, for the card.

    Raises ValueError where the card would not be true, FileExistsError for a `folder` that `publish`
    did not write, PushError for a push that failed, with the folder whole.
    """
    check_target(folder)
    place = workplace(folder)
    try:
        shutil.copytree(finalist, place, dirs_exist_ok=True)
        shutil.copy(picture, place / CHOICE)
        report = read_report(place) | {"name": name, "choice": {key: choice[key] for key in _TOLD}}
        (place / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        pictures = [picture for picture in PICTURES if (place / picture).is_file()]
        (place / "README.md").write_text(render(report, pictures=pictures), encoding="utf-8")
        validate(place)
        move_into_place(folder)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    if to is not None:
        send(folder, to)
