"""Refuses a card that says what the report does not, or that the Hub would refuse."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard

from hf_compress.publishing.card import EFFICIENCY, NOT_MEASURED, hub_id, lookup
from hf_compress.publishing.licenses import LICENSES

RELATIONS = ("finetune", "quantized", "adapter", "merge")
_LEFTOVERS = ("{{", "}}", "{%", "%}", "More information needed", "[optional]")
# Two parts at least, and not behind a host, a word or another slash: "and/or" is no path.
LOCAL_PATH = re.compile(r"(?<![\w/.:)\]-])(?:/[\w.-]+/[\w./-]+|~/[\w./-]+|[A-Za-z]:\\\S+)")
_LINK = re.compile(r"\]\(([^)]+)\)")


def check_license(identifier: str | None, name: str | None) -> None:
    """Raises ValueError for a licence that the Hub does not know, or "other" without a name."""
    if identifier is None:
        if name is not None:
            raise ValueError(f"`license_name` {name!r} needs license='other'.")
        return
    if identifier not in LICENSES:
        raise ValueError(
            f"`license` {identifier!r} is no identifier of the Hub. Take one of "
            "huggingface.co/docs/hub/repositories-licenses (apache-2.0, mit, ...), or license='other' "
            "with a `license_name`."
        )
    if identifier == "other" and not name:
        raise ValueError("license='other' needs a `license_name`.")


def validate(folder: str | Path) -> None:
    """Checks `README.md` in `folder` against `report.json` beside it.

    Raises ValueError that lists what is wrong, where, and the mend.
    """
    folder = Path(folder)
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    text = (folder / "README.md").read_text(encoding="utf-8")
    problems = list(_problems(text, report, folder))
    if problems:
        raise ValueError("The card is not fit to publish:\n- " + "\n- ".join(problems))


def _problems(text: str, report: Mapping[str, Any], folder: Path) -> Iterator[str]:
    try:
        card = ModelCard(text)
    except (ValueError, yaml.YAMLError) as error:
        yield f"front matter: cannot be read ({error}). It is YAML between two lines of '---'."
        return
    yield from _front_matter(card.data.to_dict(), report)
    for number, line in enumerate(text.splitlines(), start=1):
        for mark in _LEFTOVERS:
            if mark in line:
                yield f"line {number}: {mark!r} was left over; fill it in or take it out."
        if path := LOCAL_PATH.search(line):
            yield f"line {number}: {path[0]!r} is a path of this machine; name it without folders."
        for link in _LINK.findall(line):
            if not link.startswith("https://") and not (folder / link).is_file():
                yield f"line {number}: the link {link!r} is neither https nor a file of the folder."
    yield from _tables(text, report)


def _front_matter(data: Mapping[str, Any], report: Mapping[str, Any]) -> Iterator[str]:
    base = data.get("base_model")
    if base is not None and hub_id(base) is None:
        yield f"base_model: {base!r} is no 'org/name' of the Hub; leave it out and name it in the text."
    if base is not None and data.get("base_model_relation") not in RELATIONS:
        yield (
            f"base_model_relation: {data.get('base_model_relation')!r} is none of "
            f"{', '.join(RELATIONS)}."
        )
    try:
        check_license(data.get("license"), data.get("license_name"))
    except ValueError as error:
        yield f"license: {error}"
    for model in data.get("model-index", []):
        for result in model["results"]:
            for metric in result["metrics"]:
                measured = report["compressed"]["metrics"].get(metric["type"])
                if metric["value"] != measured:
                    yield (
                        f"model-index: {metric['type']} is {metric['value']}, the report has "
                        f"{measured} for the compressed model."
                    )


def _tables(text: str, report: Mapping[str, Any]) -> Iterator[str]:
    sides = (report["dense"], report["compressed"])
    expected: dict[str, list[float | None]] = {
        label: [lookup(side, path) for side in sides] for label, path in EFFICIENCY.items()
    }
    for name, recovered in ((n, report["recovery"].get(n)) for n in report["compressed"]["metrics"]):
        scores = [side["metrics"].get(name) if side else None for side in sides]
        expected[name.replace("|", "\\|")] = [*scores, recovered]
    found = {}
    for number, line in enumerate(text.splitlines(), start=1):
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip())][1:-1]
        if cells and cells[0] in expected and len(cells) == 1 + len(expected[cells[0]]):
            found[cells[0]] = number
            for cell, value in zip(cells[1:], expected[cells[0]], strict=True):
                if not _says(cell, value):
                    yield f"line {number}: {cells[0]} is {cell!r}, the report has {value}."
    for label in expected.keys() - found.keys():
        yield f"tables: the row {label!r} is missing."


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
