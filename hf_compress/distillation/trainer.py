"""Distillation inside any Trainer: its loop stays, only the loss is ours."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
import transformers
from datasets import Dataset
from packaging.version import Version
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from hf_compress.constraint import torch_optimizer
from hf_compress.distillation.arguments import DistillationArgumentsMixin
from hf_compress.distillation.cache.cells import OUTPUTS, STATES
from hf_compress.distillation.cache.teacher import cached_teacher
from hf_compress.distillation.divergences import Divergence
from hf_compress.distillation.features.match import Match
from hf_compress.distillation.features.matching import FeatureMatching
from hf_compress.distillation.features.presets import as_matches
from hf_compress.distillation.fidelity import Comparison, compare_bits
from hf_compress.distillation.objective import Objective, mixed
from hf_compress.distillation.on_policy import OnPolicy
from hf_compress.distillation.scaling import Scaling, measure_scaling, tolerance_of
from hf_compress.distillation.tasks.heads import head_of
from hf_compress.distillation.tasks.task import Sums
from hf_compress.distillation.teachers import ask, normalized
from hf_compress.distillation.totals import Totals
from hf_compress.distillation.translation.teacher import translated_teacher
from hf_compress.distillation.unsupported import refuse_unsupported
from hf_compress.frozen import snapshot

logger = logging.getLogger(__name__)


class DistillationMixin(Trainer):
    """Adds a teacher to a Trainer class (papers/1503.02531).

        class DistillSFT(DistillationMixin, SFTTrainer): ...

    The loss is `(1 - alpha) * task + alpha * T^2 * KL(teacher || student)`, or another divergence
    (`hf_compress.distillation.divergences`), each part the mean over the items of the whole accumulated
    batch on all processes: loss and gradients do not depend on how that batch is cut. The task's own
    loss is computed here too, from the logits, since many models ignore the item count that Trainer
    gives them. `loss_task`, `loss_kd` and `agreement` (how often both models choose the same class) are
    logged, and come with evaluation under its prefix.

    teacher: a model (frozen and moved in place), a path or hub id; "self", a copy of the student as it
        is when the trainer is built: the dense model, when it is pruned later; "base", the model under
        the student's adapters, without a second copy; or a list of these. "cached": the answers that
        `precompute_teacher` has added to the datasets, with no teacher in memory.
    teacher_bits: 8 or 4 loads the teachers through bitsandbytes; None keeps their precision. "auto"
        takes the cheapest of these that differs from the full teacher by a KL of `teacher_max_kl` at
        most, by default 0.01 nats an item of the first rows; `teacher_comparison` says what was seen.
    teacher_weights: one number above 0 for each teacher, of whose distributions the weighted mean
        teaches; None: all equal.
    on_policy (of `args`): the part of the optimizer steps, the same on all processes, in which the
        student writes the labelled tokens itself (papers/2306.13649), and the whole loss is the
        distance from the teacher there, logged as `on_policy_loss_kd`.
    teacher_processing_class: the teacher's tokenizer, where it is another than the student's: causal
        language models are then compared over the text between the places where both cut, as
        `across_tokenizers` of the arguments says. Needs the student's as `processing_class`.
    matches: what is compared inside both models while training, added to the loss by its weight and
        logged as `loss_<name>`: one or several `hf_compress.distillation.features.match.Match`, or the
        name of a preset. Evaluation compares the outputs only.

    Takes the arguments of the Trainer below it; `args` must have `temperature` and `alpha`
    (`DistillationArguments`). What cannot work raises here; labels that do not fit the head raise in
    the first step, before any weight has moved. Not supported: DeepSpeed, `nn.DataParallel`, tensor or
    context parallelism. On top of trl's SFTTrainer its entropy and token accuracy are not logged.
    """

    loss_is_scaled_for_ga = True
    model: nn.Module
    args: Any  # a TrainingArguments with the fields of DistillationArgumentsMixin
    objective: Objective

    def __init__(
        self,
        model: nn.Module | str | None = None,
        args: Any = None,
        *others: Any,
        teacher: nn.Module | str | Sequence[nn.Module | str],
        teacher_bits: int | str | None = None,
        teacher_max_kl: float | None = None,
        teacher_weights: Sequence[float] | None = None,
        teacher_processing_class: Any = None,
        matches: str | Match | Sequence[Match] = (),
        **trainer_arguments: Any,
    ) -> None:
        if not isinstance(args, DistillationArgumentsMixin):
            raise TypeError(
                f"`args` must have `temperature` and `alpha`, got {type(args).__name__}. Pass a "
                "DistillationArguments, or for another arguments class a dataclass of your own: "
                "class MyArguments(DistillationArgumentsMixin, SFTConfig)."
            )
        given: list[Any] = list(teacher) if isinstance(teacher, list | tuple) else [teacher]
        from_student = any(isinstance(each, str) and each in ("self", "base") for each in given)
        self._cached = given == ["cached"]
        # Before any Trainer has wrapped or patched it.
        given = [_copy_of(model) if each == "self" else each for each in given]
        super().__init__(model, args, *others, **trainer_arguments)  # type: ignore[arg-type]
        if Version(transformers.__version__) < Version("5.19"):
            # Those versions ask this flag whether the loss is scaled already.
            self.model_accepts_loss_kwargs = True
        refuse_unsupported(self)
        compared = as_matches(matches)
        translated = teacher_processing_class is not None
        if translated and (teacher_bits == "auto" or compared):
            raise ValueError(
                "`teacher_processing_class` goes with neither `matches` nor teacher_bits='auto', which "
                "ask the teacher about the student's tokens: leave them out."
            )
        head = head_of(self.model)
        self._on_policy = OnPolicy(
            self.args.on_policy,
            self.args.on_policy_temperature,
            self.args.seed,
            self.args.process_index,
        )
        self._on_policy.check(
            head, answers_again=not (translated or self._cached), sharded=self.is_fsdp_enabled
        )
        self.teacher_comparison: Comparison | None = None
        bits = self._bits(given, teacher_bits, teacher_max_kl)
        if translated:
            teaching = translated_teacher(
                self.model,
                given,
                self.data_collator,
                ours=self.processing_class,
                theirs=teacher_processing_class,
                across=self.args.across_tokenizers,
                bits=bits,
                device=self.args.device,
            )
        elif self._cached:
            teaching = cached_teacher(
                self.model,
                [self.train_dataset, self.eval_dataset],
                self.data_collator,
                bits=bits,
                inside=bool(compared),
            )
        else:
            teaching = ask(
                given,
                self.model,
                head,
                bits=bits,
                device=self.args.device,
                processing=self.processing_class,
            )
        if compared and teaching.inside is None:
            raise ValueError("`matches` need one teacher's layers, not those of 'base' or several.")
        self.data_collator = teaching.collator or self.data_collator
        self.teachers = list(teaching.models)
        self.teacher = teaching.alone
        self.kept_answers = teaching.origin
        self.objective = Objective(
            head,
            teaching.asked,
            normalized(teacher_weights, len(given)),
            self.accelerator.autocast,
            self.args.chunk_size,
            teaching.task,
        )
        self.matching = FeatureMatching(
            self.model,
            teaching.inside or self.model,
            compared,
            device=self.args.device,
            seed=self.args.seed,
            kept=teaching.states,
        )
        if self.matching.projections.weights and self.is_fsdp_enabled:
            raise NotImplementedError(
                "`matches` with a projection under FSDP: its optimizer saves parameters of the model "
                "only. Use DDP, or match layers of equal width."
            )
        self.annealed: Mapping[str, float] = {}  # `alpha` and `temperature` in place of those of `args`
        self._student_writes = False
        self._train_totals = Totals(self.args.device)
        self._on_policy_totals = Totals(self.args.device)
        self._eval_totals = Totals(self.args.device)
        # A copy of the student agrees with it until the student moves: that is no mistake.
        self._teacher_differs = from_student or translated
        self._loss_only = False
        self._attach_callbacks()

    def _bits(self, given: list[Any], asked: int | str | None, max_kl: float | None) -> Any:
        """Of the teachers; where "auto" is asked for, by a comparison on the first rows."""
        if asked == "auto":
            self.teacher_comparison = compare_bits(
                given, *self._first_rows(64), self.args.make_divergence()
            )
            return self.teacher_comparison.cheapest(0.01 if max_kl is None else max_kl).bits
        if max_kl is not None:
            raise ValueError("`teacher_max_kl` would be ignored: it goes with teacher_bits='auto'.")
        return asked

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        if self._cached and OUTPUTS not in columns:
            columns.extend([OUTPUTS, STATES])

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor]:
        """The batches of one optimizer step, and their number of items over all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._student_writes = self._on_policy.in_step(self.state.global_step)
        if self._student_writes:
            placed = [self._prepare_inputs(batch) for batch in batches]
            with self.accelerator.autocast():
                batches = self._on_policy.written(self.model, placed, self.state.global_step)
        self.matching.count(batches, self._summed)
        return batches, self._summed(self.objective.items(self.model, batches, device))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The mixed loss, with the student's outputs where asked.

        In training the sum over the items here divided by `num_items_in_batch`, times the number of
        processes, over which the gradients are averaged. In evaluation the mean over the items here.
        """
        prepared = self.objective.prepare(model, inputs, logits=return_outputs and not self._loss_only)
        if model.training:
            self.matching.start(self.model)
        alpha, divergence = self._mix(training=model.training)
        if model.training and self._student_writes:
            alpha = 1.0  # what the student wrote itself is no task
        sums, outputs = self.objective.sums(
            model,
            inputs,
            divergence=divergence,
            alpha=alpha,
            rows=None if model.training else self._real_rows(inputs),
            prepared=prepared,
        )
        if model.training and num_items_in_batch is not None:
            items = torch.as_tensor(num_items_in_batch, device=sums.items.device)
            loss = mixed(sums, items, alpha) * self.accelerator.num_processes
        else:
            loss = mixed(sums, sums.items, alpha)
        if model.training:
            loss = loss + self.matching.loss(inputs, self.accelerator.num_processes)
        self._record(sums, training=model.training)
        return (loss, outputs) if return_outputs else loss

    def _mix(self, *, training: bool) -> tuple[float, Divergence]:
        annealed = self.annealed if training else {}
        divergence = self.args.make_divergence()
        if "temperature" in annealed:
            divergence = replace(divergence, temperature=annealed["temperature"])
        return annealed.get("alpha", self.args.alpha), divergence

    def check_scaling(self, rows: int = 8) -> Scaling:
        """The loss and the norm of its gradient for the first `rows` rows of the train dataset, cut
        into batches in several ways, printed as a table and returned.

        They agree where the loss is right. What makes them differ: a model or a collator by which a row
        depends on the padding or on the other rows of its batch. Dropout is off, normalisation over
        batches on its running averages; `matches` and the processes are left out. Model, gradients,
        optimizer, logs and random states are afterwards as they were.

        Raises ValueError without at least two rows and a label in them.
        """
        examples, collate = self._first_rows(rows)
        half = self.accelerator.mixed_precision != "no"
        scaling = measure_scaling(
            self.model, examples, collate, self._losses, tolerance=tolerance_of(self.model, half=half)
        )
        if self.is_world_process_zero():
            print(scaling)
        return scaling

    def _first_rows(self, rows: int) -> tuple[list[Any], Any]:
        dataset: Any = self.train_dataset
        collate: Any = self.data_collator
        if isinstance(dataset, Dataset):
            dataset = self._remove_unused_columns(dataset)
        else:
            collate = self._get_collator_with_removed_columns(collate)
        examples = [] if dataset is None else list(islice(dataset, rows))
        if len(examples) < 2:
            raise ValueError(
                f"There are {len(examples)} rows to cut: pass a `train_dataset` and at least 2 `rows`."
            )
        return examples, collate

    def _losses(self, batches: Sequence[Mapping[str, Any]]) -> Iterator[Tensor]:
        return self.objective.losses(
            self.model,
            [self._prepare_inputs(dict(batch)) for batch in batches],
            divergence=self.args.make_divergence(),
            alpha=self.args.alpha,
            device=self.args.device,
        )

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """As the Trainer below does, with a group for each projection of the matches."""
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.matching.projections.weights:
            self.matching.join(torch_optimizer(optimizer))
        return optimizer

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the Trainer below does; DDP knows nothing of the projections of the matches."""
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            self.matching.end_step(self._summed, lambda grad: self.accelerator.reduce(grad, "mean"))
        return loss

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            self.matching.save(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self.matching.load(checkpoint)
        super()._load_optimizer_and_scheduler(checkpoint)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer below does; nothing stays attached to the models, or annealed."""
        weights = dict(self.matching.weights)
        try:
            return super().train(*args, **kwargs)
        finally:
            self.matching.stop()
            self.annealed = {}
            self.matching.weights.update(weights)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **generation: Any,
    ) -> tuple[Any, Any, Any]:
        """As the Trainer below does, but for one that generates, which asks the model for its loss."""
        seen = self._eval_totals.batches
        self._loss_only = prediction_loss_only
        loss, predictions, labels = super().prediction_step(
            model, inputs, prediction_loss_only, ignore_keys, **generation
        )
        if loss is not None and self._eval_totals.batches == seen:
            with torch.no_grad(), self.compute_loss_context_manager():
                loss = self.compute_loss(model, self._prepare_inputs(inputs)).detach()
        return loss, predictions, labels

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        self._eval_totals.forget()
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        means = self._means(self._eval_totals)
        if means and output.metrics is not None:
            # Trainer's own loss is a mean of batch means, which depends on the evaluation batch size.
            alpha = self.args.alpha
            means["loss"] = (1 - alpha) * means["loss_task"] + alpha * means["loss_kd"]
            output.metrics.update(
                {f"{metric_key_prefix}_{name}": value for name, value in means.items()}
            )
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # the training log, which every process writes
            logs.update(self._means(self._train_totals))
            written = self._means(self._on_policy_totals)
            logs.update({f"on_policy_{k}": written[k] for k in written if k != "loss_task"})
            logs.update(self.matching.means(self._summed))
        if "loss" in logs or "train_loss" in logs:
            self._train_totals.forget()
            self._on_policy_totals.forget()
            self.matching.forget()
        super().log(logs, start_time)

    def _real_rows(self, batch: Mapping[str, Any]) -> int | None:
        """How many rows of the last evaluation batch do not merely fill it up for the other ranks."""
        state = self.accelerator.gradient_state
        if not state.end_of_dataloader or state.remainder < 1:
            return None
        rows = len(batch[self.objective.head.labels[0]])
        return min(max(state.remainder - self.accelerator.process_index * rows, 0), rows)

    def _summed(self, values: Tensor) -> Tensor:
        return self.accelerator.reduce(values, "sum")

    def _record(self, sums: Sums, *, training: bool) -> None:
        if not training:
            self._eval_totals.add(sums)
            return
        (self._on_policy_totals if self._student_writes else self._train_totals).add(sums)
        if not self._teacher_differs and sums.items.sum() > 0:
            self._teacher_differs = True
            if sums.distillation.sum() == 0:
                logger.warning(
                    "The teacher gives exactly the student's outputs on the first batch, so there is "
                    "nothing to learn from it. Is it the model you meant?"
                )

    def _means(self, totals: Totals) -> dict[str, float]:
        task = self.objective.task
        return totals.means(self._summed, agreement=task is not None and task.agreement)

    def _attach_callbacks(self) -> None:
        from hf_compress.callbacks.base import CompressionCallback

        for callback in list(self.callback_handler.callbacks):
            if isinstance(callback, CompressionCallback):
                callback.attach(self)


class DistillationTrainer(DistillationMixin):
    """`Trainer` with a teacher: see `DistillationMixin`."""


def _copy_of(model: nn.Module | str | None) -> nn.Module | str:
    if model is None:
        raise ValueError("teacher='self' copies the student: pass `model`, not `model_init`.")
    return model if isinstance(model, str) else snapshot(model)
