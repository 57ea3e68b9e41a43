"""What `choose` has done for it: the dense model, and candidates predicted, trained and published."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast, Trainer, set_seed

from hf_compress.choosing.building import FORMAT, Timed, check, measure, predict
from hf_compress.choosing.candidates import Candidate
from hf_compress.choosing.limits import Measured
from hf_compress.choosing.records import digest_of
from hf_compress.choosing.search import DENSE, Choice, Finished, Trained
from hf_compress.cli.arguments import CompressArguments
from hf_compress.cli.data import bare_name
from hf_compress.cli.inputs import is_padded, load_processor, prepared
from hf_compress.cli.judging import metric_of, three_splits
from hf_compress.cli.rows import Evaluation
from hf_compress.cli.tasks import load_model
from hf_compress.cli.trainers import Trainers
from hf_compress.distillation.arguments import DistillationArguments
from hf_compress.example_inputs import example_inputs
from hf_compress.measure import environment
from hf_compress.publishing.evaluation import trainer_scores
from hf_compress.publishing.publish import publish

# Settings that change no number of a training.
_ASIDE = ("output_dir", "logging_", "push_to_hub", "hub_", "disable_tqdm", "report_to", "run_name")


class Trainings:
    """A `hf_compress.choosing.search.Work` of Trainers, for texts, images and sound.

    folder: where the dense model and the finalists go. key: names everything that the results depend
    on. Raises ValueError for rows, columns, a model and a metric that do not go together, before any
    work.
    """

    def __init__(
        self,
        arguments: CompressArguments,
        training: DistillationArguments,
        *,
        folder: Path,
        validation_split: str = "validation",
        metric: str | None = None,
        dense_epochs: float | None = None,
        latency_batch: int = 1,
        memory: bool = False,
    ) -> None:
        self.arguments, self.training, self.folder = arguments, training, folder
        self.dense_epochs, self.memory = dense_epochs, memory
        self.metric = metric_of(metric, labelled=arguments.task != "causal-lm")
        self.splits = three_splits(arguments, validation_split)
        self.processor = load_processor(arguments)
        self.timed = Timed(batch=latency_batch, length=self._length())
        # What is no text, image or sound is refused before any work.
        prepared(self.splits.train.select([0]), self.processor, arguments, self.splits.names)
        set_seed(training.seed)
        self.model: Any = load_model(arguments, self.splits.names)
        self.steps = training.max_steps
        if self.steps <= 0:
            self.steps = _steps(training, len(self.splits.train), training.num_train_epochs)
        self.trainers = Trainers(
            arguments,
            training,
            self.splits,
            self.processor,
            dense=self.place(DENSE),
            scratch=folder / "training",
        )
        self.key = self._key()

    @property
    def cuts_vocabulary(self) -> bool:
        """Whether there is a fast tokenizer, whose tokens can be told apart, and the score is not of
        tokens: a perplexity over the pieces of a smaller vocabulary is another measure."""
        fast = isinstance(self.processor, PreTrainedTokenizerFast)
        return fast and self.arguments.task != "causal-lm"

    def check(self, candidates: Sequence[Candidate]) -> None:
        """Raises ValueError where one of `candidates` cannot be made of the model or its tokenizer."""
        check(candidates, self.model)
        if self.cuts_vocabulary or not any(each.vocabulary for each in candidates):
            return
        why = (
            "a perplexity over the tokens of a smaller vocabulary is another measure than that of the "
            "dense model"
            if self.arguments.task == "causal-lm"
            else f"the model has a {type(self.processor).__name__} and no fast tokenizer, of which a "
            "vocabulary could be cut"
        )
        raise ValueError(f"{why}: leave `vocabulary` out of the space.")

    def dense(self) -> Finished:
        trained = None
        if self.dense_epochs is not None:
            set_seed(self.training.seed)
            steps = _steps(self.training, len(self.splits.train), self.dense_epochs)
            base = self.trainers.based(self.model, self.processor)
            trained = self._train(self.trainers.of_model(base, self.model, steps), steps)
        place = self.place(DENSE)
        unfinished = place.with_name(f".{DENSE}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        self.model.save_pretrained(unfinished)
        self.processor.save_pretrained(unfinished)
        shutil.rmtree(place, ignore_errors=True)
        unfinished.rename(place)
        scores = self._dense_scores
        return Finished(
            validation=scores["validation"][self.metric.name],
            test=scores["test"][self.metric.name],
            measured=replace(self.measure(DENSE), speedup=1.0),  # beside itself it is noise
            digest=_digest(place),
            training=trained,
        )

    def predict(self, candidate: Candidate) -> Measured:
        base, dense = (self.trainers.base(vocabulary=cut) for cut in (candidate.vocabulary, False))
        return predict(
            candidate, base.model, dense.model, self.timed, folder=self.folder, memory=self.memory
        )

    def train(self, candidate: Candidate, steps: int) -> Trained:
        return self._train(self.trainers.of_candidate(candidate, steps), steps)

    def finish(self, candidate: Candidate, steps: int) -> Finished:
        trainer = self.trainers.of_candidate(candidate, steps)
        trained = self._train(trainer, steps)
        base = self.trainers.base_of(candidate)
        dense = self.trainers.base(vocabulary=False).model
        trainer.eval_dataset = base.test
        scores = trainer_scores(trainer)
        # The dense model reads rows of its own tokenizer.
        own = self._dense_scores["test"]
        split, place = self.splits.test_split, self.place(candidate.name)
        how = self._evaluation()
        publish(
            trainer,
            folder=place,
            baseline=dense,
            evaluate=lambda model: own if model is dense else scores(model),
            inputs=example_inputs(base.model, batch=self.timed.batch, length=self.timed.length),
            base_model=self.arguments.model,
            dataset=bare_name(self.arguments.dataset),
            split=split,
            evaluation=asdict(how),
            metric=self.metric.name,
            format="dense" if candidate.bits is None else FORMAT,
        )
        report = json.loads((place / "report.json").read_text(encoding="utf-8"))
        return Finished(
            validation=trained.score,
            test=report["compressed"]["metrics"][self.metric.name],
            measured=self.measure(candidate.name),
            digest=_digest(place),
            training=trained,
        )

    def told_of_test(self) -> dict[str, Any]:
        """What the test rows are."""
        return {"dataset": bare_name(self.arguments.dataset), **asdict(self._evaluation())}

    def measure(self, name: str) -> Measured:
        dense = self.trainers.base(vocabulary=False).model
        return measure(self.place(name), dense, self.timed, memory=self.memory)

    def is_whole(self, name: str, digest: str) -> bool:
        try:
            return _digest(self.place(name)) == digest
        except FileNotFoundError:
            return False

    def place(self, name: str) -> Path:
        """Folder of the dense model or of a finalist."""
        return self.folder / DENSE if name == DENSE else self.folder / "finalists" / name

    def cautions(self, choice: Choice) -> Iterator[str]:
        """Why the drop may be another one than it seems to be, where that is limited."""
        score, drop = choice.dense.validation, choice.limits.drop
        if drop is None:
            return
        if self.splits.cut and self.dense_epochs is None:
            yield (
                "Caution: the validation rows are of the split that the dense model may have been "
                "fine-tuned on, which flatters it: have a `validation` split, or let `dense_epochs` "
                "fine-tune it here."
            )
        rows = len(self.splits.validation)
        error = self.metric.points * math.sqrt(max(score * (1 - score), 0) / rows)
        if self.metric.name == "accuracy" and error > drop:
            yield (
                f"Caution: of {rows:,} validation rows an accuracy of {score:.3f} has a standard error "
                f"of {error:.1f} points, more than the drop of {drop:g} that is to be seen."
            )

    def _evaluation(self) -> Evaluation:
        size = self.training.eval_batch_size
        return Evaluation.of(self.arguments, split=self.splits.test_split, batch_size=size)

    def _length(self) -> int | None:
        """Tokens or samples of the pass that is timed; None of images and spectrograms."""
        if self.arguments.reads_text:
            return self.arguments.max_length
        raw = is_padded(self.processor)
        return round(self.arguments.max_seconds * self.processor.sampling_rate) if raw else None

    @cached_property
    def _dense_scores(self) -> dict[str, dict[str, float]]:
        base = self.trainers.base(vocabulary=False)
        trainer = self.trainers.of_model(base, base.model, 1)
        found = {}
        for name, rows in (("validation", base.validation), ("test", base.test)):
            trainer.eval_dataset = rows
            found[name] = trainer_scores(trainer)(base.model)
        return found

    def _train(self, trainer: Trainer, steps: int) -> Trained:
        begin = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - begin
        model: Any = trainer.model
        score = trainer_scores(trainer)(model)[self.metric.name]
        return Trained(steps=steps, score=score, seconds=seconds)

    def _key(self) -> str:
        """Of the weights, the rows, the settings, the machine and the versions."""
        training = self.training.to_dict()
        told = [
            {name: value for name, value in training.items() if not name.startswith(_ASIDE)},
            vars(replace(self.arguments, model="", dataset="")),
            [self.metric.name, self.dense_epochs, asdict(self.timed), environment()],
            *(part.to_dict() for part in (self.splits.train, self.splits.validation, self.splits.test)),
        ]
        weights = (tensor.detach().cpu().reshape(-1) for tensor in self.model.state_dict().values())
        return digest_of(
            [
                json.dumps(told, default=str).encode(),
                *(weight.view(torch.uint8).numpy().tobytes() for weight in weights),
            ]
        )


def _steps(training: DistillationArguments, rows: int, epochs: float) -> int:
    """Of the optimizer, as a Trainer counts them."""
    batches = math.ceil(rows / training.train_batch_size)
    updates = max(1, math.ceil(batches / training.gradient_accumulation_steps))
    return max(1, math.ceil(updates * epochs))


def _digest(folder: Path) -> str:
    """Of the weights. Raises FileNotFoundError where there are none."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(folder)
    return digest_of(part for file in files for part in (file.name.encode(), file.read_bytes()))
