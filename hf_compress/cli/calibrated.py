"""What the commands share that prune a trained model without training it: rows, model, result."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_compress.calibration.batches import Batch
from hf_compress.cli.arguments import CalibrationArguments
from hf_compress.cli.checks import check_folder
from hf_compress.cli.data import bare_name, label_names, load_shuffled
from hf_compress.cli.inputs import load_tokenizer, tokenized
from hf_compress.measure import environment
from hf_compress.publishing.audit import Audit

Reads = Literal["nothing", "texts", "labels"]
"""Of the dataset. A causal language model takes its labels from the texts."""


def check(arguments: CalibrationArguments, reads: Reads) -> None:
    """Raises ValueError for settings that are wrong whatever the model is, and where several processes
    were launched."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("this command is one process, which uses all GPUs: launch only one.")
    if not arguments.reads_text:
        raise ValueError("this command reads texts: pass a `task` of text.")
    for name in ("rows", "batch_size", "max_length"):
        if vars(arguments)[name] < 1:
            raise ValueError(f"`{name}` is {vars(arguments)[name]}: pass 1 or more.")
    if reads != "nothing" and arguments.dataset is None:
        raise ValueError("pass `dataset`: this `score` needs rows of what the model is meant for.")
    if Path(arguments.model).resolve() == Path(arguments.output_dir).resolve():
        raise ValueError(
            f"`output_dir` {arguments.output_dir!r} is the folder of the given model: choose another."
        )
    check_folder(arguments.output_dir)


@contextmanager
def loaded(
    arguments: CalibrationArguments, reads: Reads
) -> Iterator[tuple[PreTrainedModel, PreTrainedTokenizerBase, list[Batch] | None]]:
    """Model, tokenizer, and batches as the model takes them, None where it reads nothing.

    Raises ValueError for data that does not fit the model, and a model without a head for the task.
    """
    tokenizer = load_tokenizer(arguments)
    batches = None if reads == "nothing" else _batches(arguments, tokenizer, reads)
    kind: Any = AutoModelForCausalLM
    if arguments.task == "text-classification":
        kind = AutoModelForSequenceClassification
    # Beside the result, where there is room for a model.
    with TemporaryDirectory(dir=arguments.output_dir, prefix=".offloaded-") as folder:
        model, info = kind.from_pretrained(
            arguments.model,
            device_map={"": "disk"} if arguments.device_map == "disk" else arguments.device_map,
            offload_folder=folder,
            output_loading_info=True,
        )
        if info["missing_keys"]:
            raise ValueError(
                f"{arguments.model} lacks {sorted(info['missing_keys'])}, so it is not trained for "
                f"{arguments.task}: train it first, or name its `task`."
            )
        yield model, tokenizer, batches


def finish(
    command: str,
    arguments: CalibrationArguments,
    found: Audit,
    *,
    batches: Sequence[Batch] | None,
    details: Mapping[str, Any],
    table: Mapping[str, str],
) -> None:
    """Writes `<command>.json` beside the audited files, and prints a table of what was found."""
    folder = Path(arguments.output_dir)
    settings = asdict(arguments)
    settings |= {name: bare_name(settings[name]) for name in ("model", "dataset")}
    del settings["output_dir"]
    content = {
        "command": command,
        "settings": settings,
        "found": found.to_dict(),
        "calibration_rows": sum(len(batch["input_ids"]) for batch in batches or []),
        **details,
        "environment": environment(),
    }
    (folder / f"{command}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    size = f"{', '.join(found.files)} in {folder}, {found.file_bytes / 1e6:,.1f} MB"
    for name, value in {"files": size, **table}.items():
        print(f"{name:16}{value}")


def _batches(
    arguments: CalibrationArguments, tokenizer: PreTrainedTokenizerBase, reads: Reads
) -> list[Batch]:
    if arguments.task == "causal-lm":
        ids = _full_rows(arguments, tokenizer)
        parts = ids.split(arguments.batch_size)
        return [{"input_ids": part} | ({"labels": part} if reads == "labels" else {}) for part in parts]
    rows = load_shuffled(arguments, labelled=reads == "labels")
    names = None
    if reads == "labels":
        names = _class_order(arguments, label_names(rows, arguments.label_column))
    chosen = rows.select(range(min(arguments.rows, len(rows))))
    data: Any = tokenized(chosen, tokenizer, arguments, names)
    collator = DataCollatorWithPadding(tokenizer)
    return [dict(b) for b in DataLoader(data, arguments.batch_size, collate_fn=collator)]


def _full_rows(arguments: CalibrationArguments, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The texts one after the other, cut into (rows, max_length): no position is padding."""
    length = arguments.max_length
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids: list[int] = []
    for row in load_shuffled(arguments, labelled=False):
        # Quiet, since it would warn of texts that are longer than a row.
        ids += [*tokenizer(row[arguments.text_column], verbose=False).input_ids, *end]
        if len(ids) >= arguments.rows * length:
            break
    if len(ids) < length:
        raise ValueError(
            f"{arguments.dataset} has {len(ids)} tokens, less than one row of `max_length` {length}."
        )
    count = min(arguments.rows, len(ids) // length)
    return torch.tensor(ids[: count * length]).reshape(count, length)


def _class_order(arguments: CalibrationArguments, names: list[str]) -> list[str]:
    """The classes of the data as the model numbers them."""
    config = AutoConfig.from_pretrained(arguments.model)
    own = [str(config.id2label[number]) for number in range(config.num_labels)]
    if set(names) <= set(own):
        return own
    if len(names) == len(own):
        return names
    raise ValueError(
        f"{arguments.dataset} has the classes {names}, but the model knows {own}: pass what the model "
        "was trained for."
    )
