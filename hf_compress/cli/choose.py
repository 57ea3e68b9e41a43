"""Find the compressed model that fits your limits: `hf-compress choose`, and `scripts/choose.py`."""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from safetensors import SafetensorError
from transformers.utils.logging import disable_progress_bar

from hf_compress.choosing.candidates import Candidate, candidates_of, default_space
from hf_compress.choosing.limits import BYTES, MILLISECONDS, Limits, parse_amount
from hf_compress.choosing.picture import draw_front
from hf_compress.choosing.records import Records, write_whole
from hf_compress.choosing.search import Choice, Prefer, search
from hf_compress.choosing.telling import in_lines, sentence, table, to_dict
from hf_compress.cli.arguments import CompressArguments, DataArguments
from hf_compress.cli.checks import check_folder
from hf_compress.cli.errors import UserError, refusing
from hf_compress.cli.recipe import parse
from hf_compress.cli.runtimes import RUNTIMES, check_runtimes, in_runtimes
from hf_compress.cli.tasks import is_untrained
from hf_compress.cli.trainings import Trainings
from hf_compress.distillation.arguments import DistillationArguments
from hf_compress.distillation.stacks import find_stacks
from hf_compress.publishing.chosen import publish_chosen
from hf_compress.publishing.destination import Destination
from hf_compress.publishing.pictures import CHOICE

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(kw_only=True)
class ChooseArguments(DataArguments):
    """Model, data, limits and recipes. Training settings (learning rate, epochs, ...) are those of
    `TrainingArguments`, and hold for each full training; `temperature` and `alpha` those of
    `DistillationArguments`. The rows of validation choose, those of the test only report."""

    max_drop: float | None = field(
        default=None,
        metadata={
            "help": "How much worse than the dense model: percentage points; of perplexity, its unit."
        },
    )
    max_size: str | None = field(default=None, metadata={"help": "Of the weights on disk, as 40MB."})
    max_latency: str | None = field(default=None, metadata={"help": "Of a forward pass, as 20ms."})
    min_speedup: float | None = field(default=None, metadata={"help": "Over the dense model, as 2."})
    max_memory: str | None = field(default=None, metadata={"help": "At the peak, as 1GB."})
    metric: Literal["accuracy", "f1", "matthews", "perplexity"] | None = field(
        default=None, metadata={"help": "By default accuracy; perplexity of language models."}
    )
    prefer: Prefer | None = field(
        default=None,
        metadata={
            "help": "What decides within the limits: size, latency or score; by default size where a "
            "drop is limited, else score."
        },
    )
    space: str | None = field(
        default=None,
        metadata={
            "help": "A yaml file of recipes, or {in: braces}, or a list of such: lists of layers, "
            "student_layers, ffn, heads, vocabulary, sparsity, bits and distil; all their combinations "
            "are tried."
        },
    )
    dense_epochs: float | None = field(
        default=None, metadata={"help": "First fine-tune the dense model, for so many epochs."}
    )
    runtimes: list[str] | None = field(
        default=None,
        metadata={
            "help": "The dense model and the finalists are also exported to these, run there and told: "
            f"{', '.join(RUNTIMES)}."
        },
    )
    finalists: int = field(default=3, metadata={"help": "How many candidates are trained fully."})
    latency_batch: int = field(
        default=1, metadata={"help": "Rows, of `max_length` tokens, of the pass that is timed."}
    )
    eval_split: str = field(
        default="test", metadata={"help": "Rows that report and never choose; else a tenth of train."}
    )
    validation_split: str = field(
        default="validation", metadata={"help": "Rows that choose; else a tenth of train."}
    )
    max_train_rows: int | None = None
    max_eval_rows: int | None = None

    def limits(self) -> Limits:
        """Raises ValueError for a number without a known unit, and where `Limits` does."""
        return Limits(
            drop=self.max_drop,
            size=parse_amount("max_size", self.max_size, BYTES),
            latency=parse_amount("max_latency", self.max_latency, MILLISECONDS),
            speedup=self.min_speedup,
            memory=parse_amount("max_memory", self.max_memory, BYTES),
        )

    def for_training(self) -> CompressArguments:
        """What the other commands call the same."""
        return CompressArguments(
            model=self.model,
            dataset=self.dataset,
            task=self.task,
            dataset_config=self.dataset_config,
            train_split=self.train_split,
            text_column=self.text_column,
            image_column=self.image_column,
            audio_column=self.audio_column,
            label_column=self.label_column,
            max_length=self.max_length,
            max_seconds=self.max_seconds,
            eval_split=self.eval_split,
            max_train_rows=self.max_train_rows,
            max_eval_rows=self.max_eval_rows,
        )


def main(argv: list[str]) -> None:
    with refusing():
        arguments, training = parse(argv, ChooseArguments, DistillationArguments)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("hf_compress.choosing").setLevel(logging.INFO)
    # Bars of every model that is written and loaded again, of which there are many.
    disable_progress_bar()
    choice = choose(arguments, training)
    if choice.winner is None:
        raise UserError(sentence(choice))


def choose(arguments: ChooseArguments, training: DistillationArguments) -> Choice:
    """Searches for the model that `arguments` ask for, and leaves in `output_dir` the table in
    `choice.json`, the picture `choice.png`, a folder for each finalist, and the winner, published.

    A call that was stopped goes on where it was; one with other limits begins with what is known.
    Raises UserError for wrong arguments, before any work, and for a disk that is full.
    """
    with refusing():
        folder, limits, to = _check(arguments, training)
        work = Trainings(
            arguments.for_training(),
            training,
            folder=folder,
            validation_split=arguments.validation_split,
            metric=arguments.metric,
            dense_epochs=arguments.dense_epochs,
            latency_batch=arguments.latency_batch,
            memory=limits.memory is not None,
        )
        runtimes = arguments.runtimes or []
        check_runtimes(runtimes, work.metric)
        candidates = _candidates(arguments, work)
        work.check(candidates)
    with going_on(folder):
        records = Records(folder / "records" / work.key)
        if not records.folder.exists() and any(records.folder.parent.glob("*")):
            print(
                f"What earlier calls found in {folder} is not used: their rows, model, settings, "
                "versions, machine or number of threads were others."
            )
        choice = search(
            work,
            candidates,
            limits,
            records,
            metric=work.metric,
            steps=work.steps,
            finalists=arguments.finalists,
            prefer=arguments.prefer,
        )
        choice.exported = list(in_runtimes(work, choice, records, runtimes))
        print(f"\n{in_lines(table(choice))}\n\n{sentence(choice)}")
        rows = work.splits.told()
        print(f"{rows['validation']} chose; {rows['test']} reports and chose nothing.")
        for caution in work.cautions(choice):
            print(caution)
        write_whole(folder / "choice.json", to_dict(choice))
        draw_front(choice, folder / CHOICE)
        winner = folder / "winner"
        if choice.winner is None:
            shutil.rmtree(winner, ignore_errors=True)  # of an earlier call with other limits
            return choice
        told = to_dict(choice) | {"rows": rows, "cautions": list(work.cautions(choice))}
        name = to.repo_id if to else f"{Path(arguments.model).name}-{choice.winner.name}"
        finalist = work.place(choice.winner.name)
        publish_chosen(finalist, winner, told, folder / CHOICE, name=name, to=to)
        print(f"the winner is in {winner}, what was tried in {folder / 'choice.json'} and {CHOICE}")
    return choice


def _check(
    arguments: ChooseArguments, training: DistillationArguments
) -> tuple[Path, Limits, Destination | None]:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("this command is one process: launch only one.")
    if arguments.dense_epochs is None and is_untrained(arguments.model):
        raise ValueError(f"{arguments.model} has a config and no weights: pass `dense_epochs`.")
    limits = arguments.limits()
    for name in ("finalists", "latency_batch"):
        if vars(arguments)[name] < 1:
            raise ValueError(f"`{name}` is {vars(arguments)[name]}: pass 1 or more.")
    if arguments.dense_epochs is not None and arguments.dense_epochs <= 0:
        raise ValueError(f"`dense_epochs` is {arguments.dense_epochs}: pass a number above 0.")
    if arguments.space is not None:
        candidates_of(read_space(arguments.space))
    check_folder(training.output_dir)
    to = None
    if training.push_to_hub:
        if training.hub_model_id is None:
            raise ValueError("`push_to_hub` needs `hub_model_id`: where the winner goes.")
        to = Destination(
            training.hub_model_id, training.hub_private_repo, None, False, training.hub_token
        ).checked()
    return Path(os.path.abspath(str(training.output_dir))), limits, to


def _candidates(arguments: ChooseArguments, work: Trainings) -> list[Candidate]:
    if arguments.space is not None:
        return candidates_of(read_space(arguments.space))
    stacks = find_stacks(work.model)
    depth = min(len(stack.layers) for stack in stacks.values())
    return candidates_of(default_space(depth, texts=work.cuts_vocabulary))


def read_space(space: str) -> Any:
    """The yaml in a file, or in `space` itself where that is in braces or brackets. Raises
    ValueError where there is none."""
    written = space.startswith(("{", "["))
    if not written and not Path(space).is_file():
        raise ValueError(f"no space at {space}.")
    try:
        return yaml.safe_load(space if written else Path(space).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{space} is not valid yaml: {error}") from None


@contextmanager
def going_on(folder: Path) -> Iterator[None]:
    """Around the search: what stops it is told with the way on."""
    try:
        yield
    except KeyboardInterrupt:
        raise UserError("stopped. The same command goes on from here.") from None
    except (OSError, SafetensorError, RuntimeError) as error:
        if not is_full_disk(error):
            raise
        raise UserError(
            f"the disk of {folder} is full, or a file may not be so large ({error}): make room. The "
            "same command then goes on from here; nothing that was finished is lost."
        ) from error


def is_full_disk(error: BaseException) -> bool:
    """Whether a file could not be written for want of room."""
    if isinstance(error, OSError) and error.errno in FULL:
        return True
    # Those who write in Rust or C++ tell the number, or the text of it, only.
    codes = "|".join(str(code) for code in FULL)
    texts = "|".join(re.escape(os.strerror(code)) for code in FULL)
    return re.search(rf"os error ({codes})\b|{texts}", str(error)) is not None
