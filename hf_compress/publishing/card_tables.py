"""The tables of a model card, from `report.json`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from hf_compress.publishing.naming import general_name

NOT_MEASURED = "not measured"
# Rows of the efficiency table: what is printed, and where it is in the measurement of a model.
EFFICIENCY = {
    "parameters": ("parameters",),
    "non-zero parameters": ("nonzeros",),
    "bytes on disk": ("bytes",),
    "weights in memory, bytes": ("weight_bytes",),
    "peak memory, bytes": ("peak_memory_bytes",),
    "latency, median, ms": ("latency", "median_ms"),
    "latency, 95th percentile, ms": ("latency", "p95_ms"),
}


def results_table(report: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Rows of metric, dense, compressed, recovery in percent."""
    dense = report["dense"]["metrics"] if report["dense"] else {}
    return [
        (
            name,
            number(dense.get(name)),
            number(value),
            f"{report['recovery'][name]:.2f}" if name in report["recovery"] else NOT_MEASURED,
        )
        for name, value in report["compressed"]["metrics"].items()
    ]


def efficiency_table(report: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Rows of quantity, dense, compressed."""
    return [
        (label, number(lookup(report["dense"], path)), number(lookup(report["compressed"], path)))
        for label, path in EFFICIENCY.items()
    ]


def exports_table(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Rows of folder, bytes, agreement, score in torch and exported, and for each batch size the median
    milliseconds of both and their ratio."""
    rows = []
    for name, found in report["exports"].items():
        parity, scores = found["parity"], ("torch", "exported")
        metric = next(iter(parity["torch"]), None)
        told = [number(parity[side].get(metric)) for side in scores]
        for size, times in found["latency"].items():
            medians = [f"{times[side]['median_ms']:.2f}" for side in scores]
            ratio = f"{found['ratios'][size]['torch']:.2f}"
            size_and_parity = (f"{found['bytes']:,}", f"{parity['agreement']:.4f}")
            rows.append((name, *size_and_parity, metric or "none", *told, size, *medians, ratio))
    return rows


def pruned_table(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Rows of weights, count, parameters, fraction of zeros: of the targets, those that are alike as
    one."""
    alike: dict[str, list[Mapping[str, Any]]] = {}
    for name in report["audit"]["targets"]:
        alike.setdefault(general_name(name), []).append(report["audit"]["tensors"][name])
    rows: list[tuple[str, ...]] = []
    for name, tensors in alike.items():
        zeros, total = (sum(tensor[key] for tensor in tensors) for key in ("zeros", "numel"))
        rows.append((name, str(len(tensors)), f"{total:,}", f"{zeros / total:.4f}"))
    return rows


def integers_table(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Rows of weights, count, bits, weights to a scale, zero points, codes in use, zeros, error."""
    kinds = report["integers"]["kinds"] if report["integers"] else []
    return [
        (
            kind["name"],
            str(kind["weights"]),
            str(kind["bits"]),
            f"{kind['per_scale']:,}",
            "yes" if kind["zero_points"] else "no",
            f"{kind['codes']:.3f}",
            f"{kind['zeros']:.4f}",
            number(kind["error"]),
        )
        for kind in kinds
    ]


def settings_of(method: Mapping[str, Any]) -> dict[str, str]:
    """The settings of a method, as text."""
    # Lists of weights are in the report, and the pictures.
    hidden = ("weights", "skipped", "paper")
    told = {key: str(value) for key, value in method.items() if key not in hidden}
    if "quantized" in method:
        counts = Counter(method["quantized"].values()).most_common()
        told["quantized"] = ", ".join(f"{count} weights of {bits} bit" for bits, count in counts)
    return told


def skipped_reasons(methods: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """How many weights no method took, by the reason."""
    methods = list(methods)
    compressed = {
        n for method in methods for part in ("weights", "quantized") for n in method.get(part, ())
    }
    skipped = {n: reason for m in methods for n, reason in m.get("skipped", {}).items()}
    reasons = Counter(reason for name, reason in skipped.items() if name not in compressed)
    return dict(reasons.most_common())


def lookup(measurement: Mapping[str, Any] | None, path: tuple[str, ...]) -> Any:
    """The value at `path`, None where any part of it was not measured."""
    value: Any = measurement
    for key in path:
        value = None if value is None else value.get(key)
    return value


def number(value: float | None) -> str:
    """A measured number as the card prints it."""
    if value is None:
        return NOT_MEASURED
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
