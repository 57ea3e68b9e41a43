"""The front matter of a card: what the Hub reads, refuses, or would misread."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from hf_compress.publishing.card import front_matter
from hf_compress.publishing.licenses import LICENSES
from hf_compress.publishing.naming import hub_id

RELATIONS = ("finetune", "quantized", "adapter", "merge")
# What the Hub takes; where it takes one value or a list of them, both.
_SCHEMA: dict[str, tuple[type, ...]] = {
    "base_model": (str, list),
    "base_model_relation": (str,),
    "datasets": (str, list),
    "language": (str, list),
    "library_name": (str,),
    "license": (str,),
    "license_link": (str,),
    "license_name": (str,),
    "metrics": (list,),
    "model-index": (list,),
    "pipeline_tag": (str,),
    "tags": (list,),
}
_DATASET = re.compile(r"[\w.-]+(/[\w.-]+)?")
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]+)*|multilingual|code")
_LICENSE_NAME = re.compile(r"[a-z0-9.-]+")


def check_license(identifier: str | None, name: str | None, link: str | None = None) -> None:
    """Raises ValueError for a licence that the Hub does not know, or "other" without a name, and for a
    link that is not https."""
    if identifier != "other":
        for setting, value in (("license_name", name), ("license_link", link)):
            if value is not None:
                raise ValueError(f"`{setting}` {value!r} needs license='other'.")
    if identifier is None:
        return
    if identifier not in LICENSES:
        raise ValueError(
            f"`license` {identifier!r} is no identifier of the Hub. Take one of "
            "huggingface.co/docs/hub/repositories-licenses (apache-2.0, mit, ...), or license='other' "
            "with a `license_name`."
        )
    if identifier == "other" and not name:
        raise ValueError("license='other' needs a `license_name`.")
    if link is not None and not link.startswith("https://"):
        raise ValueError(f"`license_link` {link!r} is not https: pass where the licence can be read.")


def metadata_problems(data: Mapping[str, Any], report: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the front matter `data` of a card: the key, and the mend."""
    wrong = list(_types(data))
    yield from wrong
    if wrong:
        return
    yield from _base(data, report)
    for name in _listed(data.get("datasets")):
        if not _DATASET.fullmatch(name):
            yield f"datasets: {name!r} is no id of the Hub, such as 'org/name'; leave it out."
    for code in _listed(data.get("language")):
        if not _LANGUAGE.fullmatch(code):
            yield f"language: {code!r} is no ISO 639 code, such as 'en' or 'deu'."
    try:
        check_license(data.get("license"), data.get("license_name"), data.get("license_link"))
    except ValueError as error:
        yield f"license: {error}"
    expected = front_matter(report).to_dict()
    for key in ("base_model", "datasets", "library_name", "metrics", "pipeline_tag"):
        if data.get(key) != expected.get(key):
            yield f"{key}: {data.get(key)!r} is not what the report says, {expected.get(key)!r}."
    tags, told = set(data.get("tags") or []), set(expected.get("tags") or [])
    for tag in sorted(told - tags):
        yield f"tags: {tag!r}, which the report says, is missing."
    for tag in sorted(tags - told):
        if re.search(r"\d", tag):
            yield f"tags: {tag!r} has a number that the report does not say; take it out."
    wrong = list(_index(data, report))
    yield from wrong
    if not wrong and data.get("model-index") != expected.get("model-index"):
        yield "model-index: it is not what the report says. Let `publish` write the card."


def _types(data: Mapping[str, Any]) -> Iterator[str]:
    for key, kinds in _SCHEMA.items():
        value = data.get(key)
        if value is None:
            continue
        if not isinstance(value, kinds):
            allowed = " or ".join("a list" if kind is list else "text" for kind in kinds)
            yield f"{key}: {value!r} must be {allowed}."
        elif isinstance(value, list) and key != "model-index":
            for entry in value:
                if not isinstance(entry, str):
                    yield f"{key}: {entry!r} must be text; put it in quotes."


def _base(data: Mapping[str, Any], report: Mapping[str, Any]) -> Iterator[str]:
    bases = _listed(data.get("base_model"))
    for base in bases:
        if hub_id(base) is None:
            yield f"base_model: {base!r} is no 'org/name' of the Hub; name it in the text only."
    relation = data.get("base_model_relation")
    if not bases:
        if relation is not None:
            yield "base_model_relation: it needs a `base_model`; leave it out."
    elif relation not in RELATIONS:
        yield f"base_model_relation: {relation!r} is none of {', '.join(RELATIONS)}."
    elif relation != report["relation"]:
        yield f"base_model_relation: {relation!r} is not what was done, {report['relation']!r}."


def _index(data: Mapping[str, Any], report: Mapping[str, Any]) -> Iterator[str]:
    for model in data.get("model-index") or []:
        if not isinstance(model, dict) or not model.get("name") or not model.get("results"):
            yield "model-index: each entry needs a `name` and `results`."
            continue
        for result in model["results"]:
            task, dataset = result.get("task", {}), result.get("dataset", {})
            if not task.get("type") or not {"name", "type"} <= dataset.keys():
                yield "model-index: each result needs `task.type`, `dataset.name` and `dataset.type`."
            for metric in result.get("metrics", []):
                measured = report["compressed"]["metrics"].get(metric.get("type"))
                if measured is None or metric.get("value") != measured:
                    yield (
                        f"model-index: {metric.get('type')} is {metric.get('value')}, the report has "
                        f"{measured} for the compressed model."
                    )


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]
