"""Both models of a card, measured in one run; the compressed one as its files load."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from hf_compress.latency import compare_latency
from hf_compress.measure import (
    CompressionReport,
    Measurement,
    bytes_in_memory,
    count_weights,
    environment,
    peak_memory,
)
from hf_compress.publishing.adapters import describe_adapters, is_adapted, open_adapters
from hf_compress.publishing.audit import Audit, audit
from hf_compress.publishing.evaluation import accepted_by_all
from hf_compress.publishing.recipe import bits_of
from hf_compress.targets import without_adapters


def measure(
    place: Path,
    found: Audit,
    model: PreTrainedModel,
    baseline: PreTrainedModel | None,
    scores: Mapping[str, dict[str, float]],
    inputs: Mapping[str, Tensor] | None,
    memory: bool,
) -> CompressionReport:
    """Both models in one run; the compressed one as it loads from `place`."""
    models = {"compressed": _reopen(place, model, found)}
    if baseline is not None:
        models["dense"] = baseline
    batch = accepted_by_all(models.values(), inputs or {})
    latency = compare_latency(models, batch) if batch else {}

    def measurement(side: str, folder: Path, files: Audit) -> Measurement:
        # Of what is packed, and of a base that lies elsewhere, the files do not tell the weights.
        loaded = bits_of(models[side]) is not None or is_adapted(models[side])
        counts = count_weights(models[side]) if loaded else files
        name, alone = type(models[side]).__name__, not is_adapted(models[side])
        return Measurement(
            parameters=counts.parameters,
            nonzeros=counts.nonzeros,
            bytes=files.file_bytes,
            weight_bytes=bytes_in_memory(models[side]),
            peak_memory_bytes=peak_memory(folder, name, batch) if alone and memory and batch else None,
            latency=latency.get(side),
            metrics=scores[side],
        )

    dense = None
    if baseline is not None:
        # On the same disk, where there is room for a model.
        with TemporaryDirectory(dir=place.parent, prefix=".") as folder:
            baseline.save_pretrained(folder)
            dense = measurement("dense", Path(folder), audit(folder))
    return CompressionReport(
        compressed=measurement("compressed", place, found), dense=dense, environment=environment()
    )


def _reopen(place: Path, model: Any, found: Audit) -> Any:
    if is_adapted(model):
        base = without_adapters(model)
        told = describe_adapters(model, found) or {}
        opened = open_adapters(place, type(base), base.config.name_or_path, told["quantization"])
        return opened if told["quantization"] else opened.to(model.device)
    reopened: Any = type(model).from_pretrained(place)
    if bits_of(model) is None:
        return reopened.to(model.device)
    from hf_compress.quantization.bnb import guard_cpu_kernels_

    return guard_cpu_kernels_(reopened)
