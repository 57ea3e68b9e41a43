"""Latency and peak memory of a report, measured again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from hf_compress.devices import device_name
from hf_compress.example_inputs import inputs_of_shapes
from hf_compress.latency import compare_latency
from hf_compress.measure import environment, peak_memory
from hf_compress.publishing.claims import Claim

TIMES = 1.5
"""How many times more or less a machine of the same name may take from one day to the next."""


def speed_claims(
    report: Mapping[str, Any], folder: Path, model: PreTrainedModel, *, latency: bool, memory: bool
) -> Iterator[Claim]:
    """What `report` states of the speed and the memory of the compressed model, found again where that
    is asked for, with inputs of the same shapes and as many threads. On another CPU or GPU it proves
    nothing."""
    compressed = report["compressed"]
    timed, peak = compressed["latency"], compressed["peak_memory_bytes"]
    here = environment()
    if timed:
        title, claimed = "latency, median, ms", timed["median_ms"]
        if not latency:
            yield Claim(title, claimed, "needs --latency", None)
        elif timed["device"] != device_name(model.device):
            yield Claim(title, claimed, f"measured on {timed['device']}", None)
        else:
            yield within(title, claimed, _latency(model, timed))
    if peak:
        title = "peak memory, bytes"
        there = report["environment"]
        if not memory or not timed:
            yield Claim(title, peak, "needs --memory", None)
        elif there["gpu"] != here["gpu"]:
            yield Claim(title, peak, f"measured on {there['gpu'] or there['cpu']}", None)
        else:
            inputs = inputs_of_shapes(model, timed["inputs"])
            yield within(title, peak, peak_memory(folder, type(model).__name__, inputs))


def within(name: str, claimed: float, found: float) -> Claim:
    """Whether neither is more than `TIMES` the other."""
    return Claim(name, claimed, found, found <= TIMES * claimed and claimed <= TIMES * found)


def _latency(model: PreTrainedModel, timed: Mapping[str, Any]) -> float:
    inputs = inputs_of_shapes(model, timed["inputs"])
    found = compare_latency({"model": model}, inputs, runs=timed["runs"], threads=timed["threads"])
    return found["model"].median_ms
