"""The dense model and the finalists of a choice in other runtimes: exported, run, and judged by the
rows that judged them in torch."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch

from hf_compress.choosing.candidates import Candidate
from hf_compress.choosing.limits import Measured
from hf_compress.choosing.records import Records
from hf_compress.choosing.search import DENSE, Choice, Exported, Finished, Metric
from hf_compress.cli.trainings import Trainings
from hf_compress.exporting.export import export_folder
from hf_compress.exporting.formats import Format, check_installed, load
from hf_compress.exporting.loading import load_floats
from hf_compress.exporting.parity import compare

logger = logging.getLogger("hf_compress.choosing.runtimes")

RUNTIMES: dict[str, tuple[Format, int]] = {
    "onnx": ("onnx", 32),
    "onnx-int8": ("onnx", 8),
    "openvino": ("openvino", 32),
    "openvino-int8": ("openvino", 8),
    "gguf-int8": ("gguf", 8),
    "gguf-int4": ("gguf", 4),
}
"""Formats and their bits, by the names of the folders that they are exported to."""
_METRICS = ("accuracy", "f1", "perplexity")


def check_runtimes(names: Sequence[str], metric: Metric) -> None:
    """Raises ValueError for an unknown name and a metric that exports are not compared by, ImportError
    where a package is missing."""
    for name in names:
        if name not in RUNTIMES:
            raise ValueError(f"`runtimes` has {name!r}; there are {', '.join(RUNTIMES)}.")
        check_installed(RUNTIMES[name][0])
    if names and metric.name not in _METRICS:
        raise ValueError(f"`runtimes` are compared by {', '.join(_METRICS)}, not by {metric.name}.")


def in_runtimes(
    work: Trainings, choice: Choice, records: Records, names: Sequence[str]
) -> Iterator[Exported]:
    """The dense model and each finalist in each of `names`, each exported into its folder, where a
    finalist's card tells of it. What is there already is not made again."""
    known: list[tuple[str, Candidate | None, Finished]] = [(DENSE, None, choice.dense)]
    known += [(each.name, each.candidate, each.finished) for each in choice.finalists if each.finished]
    for name, candidate, finished in known:
        for runtime in names:
            yield _once(work, records, name, candidate, runtime, finished.digest)


def _once(
    work: Trainings,
    records: Records,
    name: str,
    candidate: Candidate | None,
    runtime: str,
    digest: str,
) -> Exported:
    def make() -> dict[str, Any]:
        logger.info("exporting %s to %s", name, runtime)
        return {"digest": digest, "exported": asdict(_export(work, name, candidate, runtime))}

    def holds(found: dict[str, Any]) -> bool:
        there = (work.place(name) / runtime / "measured.json").is_file()
        return there and found["digest"] == digest

    found = records.once(f"{name}.{runtime}", make, holds=holds)["exported"]
    return Exported(**found | {"measured": Measured(**found["measured"])})


def _export(work: Trainings, name: str, candidate: Candidate | None, runtime: str) -> Exported:
    trainers, folder = work.trainers, work.place(name)
    base = trainers.base(vocabulary=candidate is not None and candidate.vocabulary)
    dense = trainers.base(vocabulary=False).model
    (format, bits), size = RUNTIMES[runtime], work.timed.batch
    # Integers of that width are there already.
    kept = format == "gguf" and candidate is not None and candidate.bits == bits
    place, measured = export_folder(
        folder,
        format,
        bits=None if kept else bits,
        batches=trainers.batches(base, base.test),
        calibration=trainers.calibration(base),
        dense=dense.cpu(),
        length=work.timed.length,
        sizes=(size,),
        threads=torch.get_num_threads(),
        runs=work.timed.runs,
        data=work.told_of_test(),
    )
    model, running = load_floats(folder)[0], load(place, format, bits=bits)
    # Those rows choose, so that a drop means the same as in torch.
    chosen = compare(model, running, trainers.batches(base, base.validation))
    parity, metric = measured["parity"], work.metric.name
    return Exported(
        name=name,
        runtime=runtime,
        validation=chosen.exported[metric],
        test=parity["exported"][metric],
        agreement=parity["agreement"],
        measured=Measured(
            bytes=measured["bytes"],
            latency_ms=measured["latency"][str(size)]["exported"]["median_ms"],
            speedup=measured["ratios"][str(size)]["dense"],
        ),
    )
