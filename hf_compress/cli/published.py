"""The end of the commands that train: a published folder, and what was measured as a table."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, Trainer

from hf_compress.cli.arguments import CompressArguments
from hf_compress.cli.data import bare_name
from hf_compress.cli.rows import Evaluation
from hf_compress.publishing.card import caution
from hf_compress.publishing.card_tables import lookup
from hf_compress.publishing.folder import on_main_process
from hf_compress.publishing.publish import publish

# Rows of the batch whose latency is measured; a language model mostly answers one.
TIMED, TIMED_OF_LANGUAGE = 16, 1


def publish_run(
    trainer: Trainer,
    arguments: CompressArguments,
    folder: Path,
    *,
    split: str,
    baseline: PreTrainedModel | None = None,
    baseline_name: str | None = None,
) -> None:
    """`publish` with what the arguments tell. On several ranks call it on each."""
    how = Evaluation.of(arguments, split=split, batch_size=trainer.args.eval_batch_size)
    language = arguments.task == "causal-lm"
    publish(
        trainer,
        folder=folder,
        baseline=baseline,
        baseline_name=baseline_name,
        memory=arguments.measure_memory,
        inputs=_timed(trainer, TIMED_OF_LANGUAGE if language else TIMED),
        base_model=arguments.base_model,
        license=arguments.license,
        language=arguments.language,
        format=arguments.format,
        dataset=bare_name(arguments.dataset),
        split=split,
        evaluation=asdict(how),
        metric="perplexity" if language else "accuracy",
    )


def publish_into(
    output: Path,
    trainer: Trainer,
    arguments: CompressArguments,
    *,
    split: str,
    baseline: PreTrainedModel | None,
    baseline_name: str | None = None,
) -> None:
    """`publish_run` to a folder that has other files of the training too; prints the table once."""
    output = output.absolute()
    # Under the name that the card shall have.
    folder = output / output.name

    def move_up() -> None:
        for file in folder.iterdir():
            file.replace(output / file.name)
        folder.rmdir()
        print_table(output, "dense", "compressed")
        print(f"model, card and report are in {output}")

    publish_run(
        trainer,
        arguments,
        folder,
        split=split,
        baseline=baseline,
        baseline_name=baseline_name,
    )
    on_main_process(move_up)


def print_table(folder: Path, dense: str, compressed: str) -> None:
    """Scores, size and latency of both models of a published folder, under these names."""
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    rows = {
        report["metric"]: ("metrics", report["metric"]),
        # Most of what belongs to adapters is the base's, which is nowhere on this disk in few bits.
        "megabytes": ("weight_bytes",) if report["adapters"] else ("bytes",),
        "parameters": ("parameters",),
        "nonzeros": ("nonzeros",),
        "latency_ms": ("latency", "median_ms"),
    }
    print(f"\n{'':14}{dense:>14}{compressed:>14}{'ratio':>9}")
    for name, path in rows.items():
        values = [lookup(report[side], path) for side in ("dense", "compressed")]
        if name == "megabytes":
            values = [None if value is None else value / 1e6 for value in values]
        pattern = ",.0f" if name in ("parameters", "nonzeros") else ".4g"
        cells = ["-" if value is None else f"{value:{pattern}}" for value in values]
        ratio = f"{values[1] / values[0]:.3f}" if values[0] else "-"
        print(f"{name:14}{cells[0]:>14}{cells[1]:>14}{ratio:>9}")
    if sentence := caution(report):
        print(sentence)


def _timed(trainer: Trainer, rows: int) -> dict[str, Tensor]:
    data: Any = trainer.eval_dataset
    batch = trainer.data_collator([data[place] for place in range(min(rows, len(data)))])
    return {name: tensor for name, tensor in batch.items() if name != "labels"}
