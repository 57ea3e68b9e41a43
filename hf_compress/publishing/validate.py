"""Refuses a card that says what the report does not, or that the Hub would refuse."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard

import hf_compress
from hf_compress.publishing.card import render
from hf_compress.publishing.card_tables import EFFICIENCY, NOT_MEASURED, lookup
from hf_compress.publishing.metadata import metadata_problems

_LEFTOVERS = ("{{", "}}", "{%", "%}", "{#", "#}", "more information needed", "[optional]")
# Two parts at least, and not behind a host, a word or another slash: "and/or" is no path.
LOCAL_PATH = re.compile(r"(?<![\w/.:)\]-])(?:/[\w.-]+/[\w./-]+|~/[\w./-]+|[A-Za-z]:\\\S+)")
_LINK = re.compile(r"\]\(([^)]+)\)")


def validate(folder: str | Path) -> None:
    """Checks `README.md` in `folder` against `report.json` beside it.

    Raises ValueError that lists what is wrong, where, and the mend.
    """
    if problems := find_problems(folder):
        raise ValueError("The card is not fit to publish:\n- " + "\n- ".join(problems))


def find_problems(folder: str | Path) -> list[str]:
    """What is wrong with `README.md` in `folder`, beside its `report.json`: where, and the mend."""
    folder = Path(folder)
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    text = (folder / "README.md").read_text(encoding="utf-8")
    return list(_problems(text, report, folder))


def _problems(text: str, report: Mapping[str, Any], folder: Path) -> Iterator[str]:
    try:
        data = yaml.safe_load(_front_matter(text))
    except yaml.YAMLError as error:
        yield f"front matter: cannot be read ({error}). It is YAML between two lines of '---'."
    else:
        if isinstance(data, dict):
            wrong = list(metadata_problems(data, report))
            yield from wrong or _round_trip(text)
        else:
            yield "front matter: there is none. It is YAML between two lines of '---' at the top."
    for number, line in enumerate(text.splitlines(), start=1):
        for mark in _LEFTOVERS:
            if mark in line.lower():
                yield f"line {number}: {mark!r} was left over; fill it in or take it out."
        if path := LOCAL_PATH.search(line):
            yield f"line {number}: {path[0]!r} is a path of this machine; name it without folders."
        for link in _LINK.findall(line):
            if not link.startswith(("https://", "#")) and not (folder / link).is_file():
                yield f"line {number}: the link {link!r} is neither https nor a file of the folder."
    told = dict(_tables(text, report))
    yield from told.values()
    if report["environment"]["versions"]["hf_compress"] == hf_compress.__version__:
        # Another version may say the same in other words.
        yield from _numbers(text, report, folder, known=told.keys())


def _round_trip(text: str) -> Iterator[str]:
    """Whether the client of the Hub reads the card, and again what it writes of it."""
    try:
        card = ModelCard(text)
        again = ModelCard(str(card))
    except (ValueError, yaml.YAMLError) as error:
        yield f"front matter: the Hub cannot read it ({error}). Let `publish` write the card."
        return
    if (again.data.to_dict(), again.text) != (card.data.to_dict(), card.text):
        yield "front matter: reads otherwise when it is written again. Let `publish` write the card."


def _numbers(
    text: str, report: Mapping[str, Any], folder: Path, *, known: Container[int]
) -> Iterator[str]:
    """Lines with a number that the report does not put there, and lines of it that are missing.

    known: numbers of the lines that were told of already.
    """
    written = render(report, pictures=[path.name for path in folder.glob("*.png")])
    expected = [line for line in _body(written).values() if re.search(r"\d", line)]
    lines = _body(text)
    missing = [line for line in expected if line not in set(lines.values())]
    for number, line in lines.items():
        if not re.search(r"\d", line) or line in expected:
            continue
        meant = difflib.get_close_matches(line, missing, n=1)
        missing = [other for other in missing if other not in meant]
        if number in known:
            continue
        if meant:
            yield f"line {number}: {line!r} is not what the report says: {meant[0]!r}."
        else:
            yield (
                f"line {number}: {line!r} states a number that is not in the report; take it out, or "
                "say it without the number."
            )
    for line in missing:
        yield f"text: the report says {line!r}, and the card does not. Let `publish` write the card."


def _front_matter(text: str) -> str:
    end = _end_of_front_matter(text)
    return "\n".join(text.splitlines()[1 : end - 1]) if end else ""


def _body(text: str) -> dict[int, str]:
    """The lines below the front matter by their number."""
    end = _end_of_front_matter(text)
    return {number: line for number, line in enumerate(text.splitlines(), start=1) if number > end}


def _end_of_front_matter(text: str) -> int:
    """Number of its last line; 0 where there is none."""
    lines = text.splitlines()
    return lines.index("---", 1) + 1 if lines[:1] == ["---"] and "---" in lines[1:] else 0


def _tables(text: str, report: Mapping[str, Any]) -> Iterator[tuple[int, str]]:
    """Number of the line, 0 for one that is missing, and what is wrong with it."""
    sides = (report["dense"], report["compressed"])
    expected: dict[str, list[float | None]] = {
        label: [lookup(side, path) for side in sides] for label, path in EFFICIENCY.items()
    }
    for name, recovered in ((n, report["recovery"].get(n)) for n in report["compressed"]["metrics"]):
        scores = [side["metrics"].get(name) if side else None for side in sides]
        expected[name.replace("|", "\\|")] = [*scores, recovered]
    found = set()
    for number, line in enumerate(text.splitlines(), start=1):
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip())][1:-1]
        if cells and cells[0] in expected and len(cells) == 1 + len(expected[cells[0]]):
            found.add(cells[0])
            wrong = [
                f"{cell!r}, the report has {value}"
                for cell, value in zip(cells[1:], expected[cells[0]], strict=True)
                if not _says(cell, value)
            ]
            if wrong:
                yield number, f"line {number}: {cells[0]} is {'; '.join(wrong)}."
    missing = [label for label in expected if label not in found]
    if missing:
        rows = ", ".join(map(repr, missing))
        yield 0, f"tables: the row {rows} is missing. Let `publish` write the card."


def _says(cell: str, value: float | None) -> bool:
    """Whether `cell` prints `value`, to the digits it shows."""
    if value is None or cell == NOT_MEASURED:
        return value is None and cell == NOT_MEASURED
    try:
        printed = float(cell.replace(",", ""))
    except ValueError:
        return False
    digits = len(cell.partition(".")[2])
    return printed == value or abs(printed - value) <= 0.5001 * 10**-digits
