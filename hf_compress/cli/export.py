"""Take a compressed model to another runtime: `hf-compress export`, and `scripts/export.py`.

Exports it, runs the export, compares both on the rows of a dataset, measures size and latency, and adds
what was found to the card and the report beside it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedModel

from hf_compress.cli.data import bare_name
from hf_compress.cli.errors import refusing
from hf_compress.cli.recipe import parse
from hf_compress.cli.rows import Evaluation, batches, load_rows, task_of_inputs
from hf_compress.exporting.export import export_folder
from hf_compress.exporting.formats import RUNTIMES, check_installed
from hf_compress.exporting.loading import load_floats


@dataclass(kw_only=True)
class ExportArguments:
    """See `hf_compress.exporting.export.export_folder`."""

    format: Literal["onnx", "openvino", "executorch", "gguf"]
    model: str = field(metadata={"help": "Folder of the compressed model; the export goes into it."})
    bits: int | None = field(
        default=None,
        metadata={
            "help": "32 or 8, of gguf 8 or 4. Without it ONNX and GGUF keep trained integers; all "
            "else has the first of these."
        },
    )
    dataset: str | None = field(
        default=None,
        metadata={
            "help": "Hub id, csv/json/parquet file, folder of save_to_disk, or packaged corpus, to "
            "compare on and to calibrate by. Without it the comparison is on random inputs."
        },
    )
    dataset_config: str | None = None
    train_split: str = field(default="train", metadata={"help": "The rows of calibration are of it."})
    eval_split: str | None = field(default=None, metadata={"help": "By default test or validation."})
    text_column: str = "text"
    image_column: str = "image"
    audio_column: str = "audio"
    label_column: str = "label"
    max_length: int = field(default=128, metadata={"help": "Tokens of a row, also of those timed."})
    max_seconds: float = field(default=10.0, metadata={"help": "Of raw sound."})
    max_eval_rows: int | None = None
    calibration_rows: int = 128
    batch_size: int = 16
    dense: str | None = field(
        default=None, metadata={"help": "Folder of the model before compression, timed beside."}
    )
    threads: int | None = field(default=None, metadata={"help": "Of torch and of the runtime."})
    runs: int = field(default=30, metadata={"help": "Timed passes of each model."})


def main(argv: list[str]) -> None:
    with refusing():
        (arguments,) = parse(argv, ExportArguments)
        check_installed(arguments.format)
        for name in ("max_length", "batch_size", "calibration_rows", "runs"):
            if vars(arguments)[name] < 1:
                raise ValueError(f"`{name}` is {vars(arguments)[name]}: pass 1 or more.")
        folder = Path(arguments.model)
        model, _ = load_floats(folder)
        rows, calibration, how = _data(arguments, folder, model)
        text = model.main_input_name == "input_ids"
        place, measured = export_folder(
            folder,
            arguments.format,
            bits=arguments.bits,
            batches=rows,
            calibration=calibration,
            dense=load_floats(Path(arguments.dense))[0] if arguments.dense else None,
            length=arguments.max_length if text else None,
            threads=arguments.threads,
            runs=arguments.runs,
            data=how,
        )
    _print(place, measured)


def _data(
    arguments: ExportArguments, folder: Path, model: PreTrainedModel
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, Any]]:
    """Batches to compare on, batches to calibrate by, and what they are."""
    if arguments.dataset is None:
        return [], [], {}
    read = {
        "text-classification": ("text_column", "max_length"),
        "image-classification": ("image_column",),
        "audio-classification": ("audio_column", "max_seconds"),
    }[task_of_inputs(model)]
    names = ("dataset_config", "label_column", "batch_size", *read)
    settings: dict[str, Any] = {"text_column": None} | {name: vars(arguments)[name] for name in names}
    how = Evaluation(split=arguments.eval_split, rows=arguments.max_eval_rows, **settings)
    rows = load_rows(model, folder, arguments.dataset, how)
    calibration: list[dict[str, Any]] = []
    if arguments.bits == 8 and RUNTIMES[arguments.format].calibrated:
        train = Evaluation(split=arguments.train_split, rows=arguments.calibration_rows, **settings)
        drawn = load_rows(model, folder, arguments.dataset, train)
        calibration = list(batches(drawn, folder, arguments.batch_size))
    told = {"dataset": bare_name(arguments.dataset), **asdict(how)}
    return list(batches(rows, folder, arguments.batch_size)), calibration, told


def _print(place: Path, measured: dict[str, Any]) -> None:
    parity = measured["parity"]
    print(f"{place}, {measured['bytes'] / 1e6:,.1f} MB: {measured['weights']}")
    print(
        f"agreement with torch {parity['agreement']:.4f} of {parity['predictions']:,} predictions on "
        f"{measured['inputs']}, logits at most {parity['max_difference']:.3g} apart"
    )
    for name, score in parity["torch"].items():
        print(f"{name:12} {score:.4f} in torch, {parity['exported'][name]:.4f} exported")
    for size, found in measured["latency"].items():
        times = [
            f"{name} {each['median_ms']:.2f} ms (p95 {each['p95_ms']:.2f})"
            for name, each in found.items()
        ]
        print(f"batch {size:6} {', '.join(times)}; {measured['ratios'][size]['torch']:.2f} times torch")
    if "decoding" in measured:
        speeds = [
            f"{name} {1000 / each['median_ms']:.1f}" for name, each in measured["decoding"].items()
        ]
        print(f"tokens a second after those of one row: {', '.join(speeds)}")
