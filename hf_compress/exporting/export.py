"""One compressed model in the format of a runtime: written, run there, compared and timed."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_compress.devices import hardware
from hf_compress.example_inputs import example_inputs, inputs_of_shapes
from hf_compress.exporting.formats import (
    RUNTIMES,
    Batch,
    Format,
    check_installed,
    export,
    keeps,
    load,
)
from hf_compress.exporting.loading import load_floats
from hf_compress.exporting.parity import Parity, compare, single_rows
from hf_compress.latency import Latency, compare_decoding, compare_latency
from hf_compress.publishing.exports import add_export, check_card

BATCHES = (1, 16)
"""How many rows are timed at once, by default."""


def export_folder(
    folder: str | Path,
    format: Format,
    *,
    bits: int | None = None,
    batches: Iterable[Batch] = (),
    calibration: Sequence[Batch] = (),
    dense: PreTrainedModel | None = None,
    length: int | None = None,
    sizes: Sequence[int] = BATCHES,
    threads: int | None = None,
    runs: int = 30,
    data: Mapping[str, Any] | None = None,
) -> tuple[Path, dict[str, Any]]:
    """Exports the model in `folder` to a folder in it, such as `openvino-int8`, and measures there what
    was written, as its runtime runs it, beside the model in torch, fp32 and eager.

    bits: of the weights, as `hf_compress.exporting.formats.RUNTIMES` tells for each format, or None:
        ONNX and GGUF then keep the integers of a compressed-tensors file that they can hold, and all
        else has the first that the format has.
    batches: inputs with `labels` to compare on; random inputs without any, which show whether the
        export computes the same, and no score.
    calibration: batches whose ranges static integers take; rows that the model is not judged by.
    dense: another model to time in the same turn, such as the one before the compression.
    length: tokens or samples of the rows that are timed, and of each row where a format has fixed
        shapes; by default as `hf_compress.example_inputs`.
    sizes: how many rows are timed at once; the first alone where a format has fixed shapes.
    threads: of torch and of the runtime. runs: timed passes of each.
    data: what `batches` are, for the report.

    Returns the new folder, and what is in its `measured.json`. Where `folder` has a `report.json`, that
    gets the same under "exports", and the card a row.

    Raises ImportError where a package of the format is missing, FileNotFoundError or ValueError for a
    folder, `bits` or rows that it cannot do, and ValueError for a card that was changed by hand.
    """
    folder = Path(os.path.abspath(folder))
    check_installed(format)
    check_card(folder)
    model, grids = load_floats(folder)
    if model.config.is_encoder_decoder and model.can_generate():
        raise ValueError(
            f"a {type(model).__name__} is an encoder and a decoder, which export as several programs: "
            "that is not supported yet. Export it with transformers.exporters."
        )
    runtime = RUNTIMES[format]
    if bits is not None or not keeps(format, model, grids):
        grids = {}
    bits = bits or max((grid.bits for grid in grids.values()), default=next(iter(runtime.weights)))
    name = format if bits == 32 else f"{format}-int{bits}"
    dynamic = runtime.dynamic
    rows = list(batches)
    inputs = _one_batch(model, rows, length, 2 if dynamic else 1)
    if not dynamic:
        size = inputs[model.main_input_name].shape[1]
        text = "input_ids" in inputs
        padding = (model.config.get_text_config().pad_token_id or 0) if text else 0
        rows = list(single_rows(rows, size, padding))
        calibration = list(single_rows(calibration, size, padding))
    calibration = [_only(batch, inputs) for batch in calibration]
    place = folder / f".{name}.unfinished"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    try:
        export(
            model,
            format,
            place,
            inputs,
            bits=bits,
            calibration=calibration,
            grids=grids,
            tokenizer=folder,
        )
        running = load(place, format, bits=bits, threads=threads)
        compared = rows or [
            _one_batch(model, [], length, n) for n in ((1, 2, 3) if dynamic else (1, 1))
        ]
        known = [_only(row, {**inputs, "labels": None}) for row in compared]
        parity = compare(model, running, known)
        # The program has no cache, and would be compared with a model that makes one.
        forward = partial(model, use_cache=False) if model.can_generate() else model
        models: dict[str, Any] = {"exported": running, "torch": forward}
        if dense is not None:
            models["dense"] = dense
        latency = {
            str(size): compare_latency(
                models, _resized(model, inputs, size), runs=runs, threads=threads
            )
            for size in (sizes if dynamic else sizes[:1])
        }
        measured = _told(format, bits, grids, place, parity, latency, rows, data)
        if runtime.cached:
            measured["decoding"] = _decoding(models | {"torch": model}, inputs, runs, threads)
        (place / "measured.json").write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
        shutil.rmtree(folder / name, ignore_errors=True)
        place.rename(folder / name)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    add_export(folder, name, measured)
    return folder / name, measured


def _decoding(
    models: Mapping[str, Any], inputs: Batch, runs: int, threads: int | None
) -> dict[str, Any]:
    """Of each the time of one more token after the first row of `inputs`."""
    row = {name: value[:1] for name, value in inputs.items()}
    found = compare_decoding(models, row, runs=runs, threads=threads)
    return {name: asdict(kinds["decode"]) for name, kinds in found.items()}


def _told(
    format: Format,
    bits: int,
    grids: Mapping[str, Any],
    place: Path,
    parity: Parity,
    latency: Mapping[str, Mapping[str, Latency]],
    rows: Sequence[Batch],
    data: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """What `measured.json` holds."""
    runtime = RUNTIMES[format]
    kept = f"the integers of the training in {len(grids)} weights, {runtime.kept}"
    packages = ("torch", "transformers", *runtime.packages.values())
    return {
        "format": format,
        "weights": kept if grids else runtime.weights[bits],
        "bytes": sum(path.stat().st_size for path in place.iterdir()),
        "inputs": "the rows of the dataset" if rows else "random",
        "data": dict(data or {}) if rows else {},
        "parity": asdict(parity),
        "latency": {
            size: {name: asdict(found) for name, found in both.items()}
            for size, both in latency.items()
        },
        "ratios": {
            size: {
                name: other.median_ms / both["exported"].median_ms
                for name, other in both.items()
                if name != "exported"
            }
            for size, both in latency.items()
        },
        "hardware": hardware(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def _one_batch(
    model: PreTrainedModel, rows: Sequence[Batch], length: int | None, size: int
) -> dict[str, Tensor]:
    """Inputs of the kinds that `rows` have, or else of those that are made for the model."""
    made = example_inputs(model, batch=size, length=length)
    if not rows:
        return made
    shape = made[model.main_input_name].shape
    return inputs_of_shapes(
        model,
        {
            name: shape if value.dim() == 2 else (size, *value.shape[1:])
            for name, value in rows[0].items()
            if name != "labels"
        },
    )


def _resized(model: PreTrainedModel, inputs: Batch, size: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return inputs_of_shapes(model, {name: (size, *value.shape[1:]) for name, value in inputs.items()})


def _only(batch: Batch, names: Iterable[str]) -> dict[str, Tensor]:
    return {name: batch[name] for name in names if name in batch}
