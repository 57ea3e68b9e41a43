"""What a card claims of scores: in `model-index`, as anybody's, and in a report beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import yaml
from huggingface_hub import ModelCard

from hf_compress.metrics.functions import perplexity
from hf_compress.publishing.claims import Claim

_OTHER_NAMES = {"mcc": "matthews_correlation", "matthews": "matthews_correlation", "acc": "accuracy"}
# Cards rarely say which mean over the classes theirs is.
_MEANS = {"f1": ("f1", "f1_weighted", "f1_binary")}
_PERCENT = ("accuracy", "f1", "matthews_correlation")


def indexed_scores(folder: Path) -> list[tuple[str, float, float]]:
    """Name, value and half a unit of the last digit of each number in the `model-index` of the card.

    Raises ValueError for front matter that cannot be read, and where there is no card.
    """
    path = folder / "README.md"
    if not path.is_file():
        raise ValueError(f"{folder} has no README.md, so nothing is claimed.")
    try:
        data = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict()
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"the front matter of the card cannot be read: {error}") from error
    scores = []
    for model in data.get("model-index") or []:
        for result in model.get("results", []):
            for metric in result.get("metrics", []):
                value = metric.get("value")
                if isinstance(value, (int, float)):
                    digits = len(repr(value).partition(".")[2].partition("e")[0])
                    scores.append((str(metric.get("type")), float(value), 0.5 * 10**-digits))
    return scores


def index_claims(
    folder: Path, found: Mapping[str, float], tolerance: float, why_not: str
) -> Iterator[Claim]:
    """The numbers of `model-index` beside those that were `found`; percents are told by their size."""
    for name, value, half in indexed_scores(folder):
        known = _OTHER_NAMES.get(name, name)
        title = f"model-index: {name}"
        if known not in found:
            yield Claim(title, value, why_not or "cannot be found here", None)
            continue
        scale = 100 if known in _PERCENT and abs(value) > 1 else 1
        means = [scale * found[mean] for mean in _MEANS.get(known, (known,)) if mean in found]
        actual = min(means, key=lambda mean: abs(mean - value))
        allowed = max(half, tolerance * max(scale, abs(actual)))
        yield Claim(title, value, actual, abs(value - actual) <= allowed)


def score_claims(
    side: str,
    claimed: Mapping[str, float],
    found: Mapping[str, float],
    tolerance: float,
    why_not: str,
) -> Iterator[Claim]:
    """The scores of one model in the report beside those that were `found`.

    tolerance: absolute, and relative to scores above 1. why_not: told of what was not found.
    """
    found = dict(found)
    if "perplexity" in found and "loss_task" not in claimed:
        found["perplexity"] = perplexity(found["loss"])  # as the report was made
    for name, value in claimed.items():
        title = f"{side}: {name}"
        if name not in found:
            needs = "needs the teacher" if name == "agreement" else "cannot be found here"
            yield Claim(title, value, why_not or needs, None)
        else:
            allowed = tolerance * max(1.0, abs(value))
            yield Claim(title, value, found[name], abs(value - found[name]) <= allowed)
