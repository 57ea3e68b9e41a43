"""What a compressed model may cost and lose, in the units in which people say it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields

BYTES = {"B": 1, "kB": 1e3, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
MILLISECONDS = {"us": 1e-3, "ms": 1.0, "s": 1e3}
TOLERANCE = 0.1
"""A prediction so far above a limit, as a fraction of it, is still tried: a latency varies."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A model as it was measured. latency_ms: median of one forward pass; speedup: dense over this, by
    medians of passes in turn. memory: peak bytes of loading and a pass, None where nobody asked."""

    bytes: int
    latency_ms: float
    speedup: float
    memory: int | None = None


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What must hold of the chosen model; None where nothing was asked.

    drop: how much worse than the dense model the score may be: percentage points of a score in [0, 1],
        the score's own unit of others, such as perplexity.
    size: bytes of the weights on disk. latency: milliseconds of a forward pass, median.
    speedup: how many times faster than the dense model at least. memory: bytes at the peak.

    Raises ValueError where nothing is asked, and for values that are negative, zero (but for a drop),
    or no finite numbers.
    """

    drop: float | None = None
    size: float | None = None
    latency: float | None = None
    speedup: float | None = None
    memory: float | None = None

    def __post_init__(self) -> None:
        for name, value in self.given().items():
            if not math.isfinite(value) or value < 0 or (value == 0 and name != "drop"):
                allowed = "points, 0 or more" if name == "drop" else "a number above 0"
                raise ValueError(f"the limit `{name}` is {value:g}: pass {allowed}.")
        if not self.given():
            raise ValueError(
                "no limit was given: pass at least one of drop, size, latency, speedup and memory."
            )

    def given(self) -> dict[str, float]:
        """The limits that were asked for, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def excess(self, measured: Measured, drop: float | None = None) -> dict[str, float]:
        """How far above its limits a model is, by the limit: 0.1 is a tenth above. Empty where it meets
        all; what was not measured is not judged, `drop` neither where it is None."""
        found = {
            "size": measured.bytes,
            "latency": measured.latency_ms,
            "memory": measured.memory,
            "drop": drop,
        }
        far: dict[str, float] = {}
        for name, limit in self.given().items():
            if name == "speedup":
                above = limit / measured.speedup - 1
            elif (value := found[name]) is None:
                continue
            else:
                # Of a limit of 0 there are no fractions: in points.
                above = (value - limit) / (limit or 1)
            if above > 1e-9:
                far[name] = above
        return far

    def told(self) -> dict[str, str]:
        """Each limit in the words of the command line."""
        return {name: told(name, value) for name, value in self.given().items()}


def told(name: str, value: float) -> str:
    """A limit, or what was measured for it, with its unit."""
    if name in ("size", "memory"):
        return f"{value / 1e6:.4g} MB"
    return {"latency": f"{value:.4g} ms", "speedup": f"{value:.4g} times", "drop": f"{value:.4g}"}[name]


def parse_amount(name: str, text: str | None, units: Mapping[str, float]) -> float | None:
    """The number in `text`, "40MB", in the unit that counts 1; None of None.

    name: of the limit. units: `BYTES` or `MILLISECONDS`.
    Raises ValueError for what is no number with one of the units behind it.
    """
    if text is None:
        return None
    found = re.fullmatch(r"\s*([-+]?[\d.]+(?:[eE][-+]?\d+)?)\s*([A-Za-z]*)\s*", text)
    try:
        number = float(found[1]) if found else math.nan
    except ValueError:
        number = math.nan
    if found is None or math.isnan(number) or found[2] not in units:
        raise ValueError(
            f"`{name}` is {text!r}: write a number and its unit, one of {', '.join(units)}."
        )
    return number * units[found[2]]
