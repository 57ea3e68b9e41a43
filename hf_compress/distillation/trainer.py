"""Distillation inside any Trainer: its loop stays, only the loss is ours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn

from hf_compress.distillation.arguments import DistillationArgumentsMixin
from hf_compress.distillation.cache.cells import OUTPUTS, STATES
from hf_compress.distillation.divergences import Divergence
from hf_compress.distillation.features.match import Match
from hf_compress.distillation.features.matching import FeatureMatching
from hf_compress.distillation.features.presets import as_matches
from hf_compress.distillation.fidelity import Comparison, compare_bits
from hf_compress.distillation.objective import Objective, mixed
from hf_compress.distillation.on_policy import OnPolicy
from hf_compress.distillation.records import Records
from hf_compress.distillation.routing import routes_of
from hf_compress.distillation.tasks.heads import head_of
from hf_compress.distillation.teachers import normalized
from hf_compress.distillation.teaching import teaching_of
from hf_compress.distillation.trainer_evaluation import EvaluationMixin
from hf_compress.distillation.trainer_matches import MatchingMixin
from hf_compress.distillation.trainer_scaling import ScalingMixin
from hf_compress.distillation.unsupported import refuse_together, refuse_unsupported
from hf_compress.frozen import snapshot
from hf_compress.publishing.trainers import PublishingMixin


class DistillationMixin(EvaluationMixin, MatchingMixin, ScalingMixin, PublishingMixin):
    """Adds a teacher to a Trainer class (papers/1503.02531).

        class DistillSFT(DistillationMixin, SFTTrainer): ...

    The loss is `(1 - alpha) * task + alpha * T^2 * KL(teacher || student)`, or another divergence
    (`hf_compress.distillation.divergences`), each part the mean over the items of the whole accumulated
    batch on all processes: loss and gradients do not depend on how that batch is cut. The task's own
    loss is computed here too, from the logits, since many models ignore the item count that Trainer
    gives them. `loss_task`, `loss_kd` and `agreement` (how often both models choose the same class) are
    logged, and come with evaluation under its prefix.

    teacher: a model (frozen in place, and moved unless it was loaded with a `device_map`), a path or
        hub id; "self", a copy of the student as it is when the trainer is built: the dense model, when
        it is pruned later; "base", the model under the student's adapters, without a second copy; or a
        list of these. "cached": the answers that `precompute_teacher` has added to the datasets, with
        no teacher in memory.
    teacher_column: of the datasets, which says by which of several teachers each row is taught: by its
        number in the list, or its name in a dict, `teacher={"law": ..., "news": ...}`.
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
    the first step, before any weight has moved. FSDP2 cuts the teachers into shards as the student.
    Not supported: DeepSpeed, FSDP1, `nn.DataParallel`, tensor or context parallelism. On top of trl's
    SFTTrainer its entropy and token accuracy are not logged.
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
        teacher: nn.Module | str | Sequence[nn.Module | str] | Mapping[Any, nn.Module | str],
        teacher_column: str | None = None,
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
        routes = routes_of(teacher, teacher_column)
        several = list(teacher.values()) if isinstance(teacher, Mapping) else teacher
        given: list[Any] = list(several) if isinstance(several, list | tuple) else [several]
        from_student = any(isinstance(each, str) and each in ("self", "base") for each in given)
        self._cached = given == ["cached"]
        # That the collator needs, though no model takes them.
        self._columns: tuple[str, ...] = (OUTPUTS, STATES) if self._cached else ()
        self._columns += () if routes is None else (routes.column,)
        # Before any Trainer has wrapped or patched it.
        given = [_copy_of(model) if each == "self" else each for each in given]
        super().__init__(model, args, *others, **trainer_arguments)  # type: ignore[arg-type]
        if Version(transformers.__version__) < Version("5.19"):
            # Those versions ask this flag whether the loss is scaled already.
            self.model_accepts_loss_kwargs = True
        refuse_unsupported(self)
        compared = as_matches(matches)
        translated = teacher_processing_class is not None
        refuse_together(
            routed=routes is not None,
            translated=translated,
            chosen=teacher_bits == "auto",
            weighted=teacher_weights is not None,
            compared=bool(compared),
        )
        head = head_of(self.model)
        self._on_policy = OnPolicy(
            self.args.on_policy,
            self.args.on_policy_temperature,
            self.args.seed,
            self.args.process_index,
        )
        self._on_policy.check(head, answers_again=not (translated or self._cached))
        self.teacher_comparison: Comparison | None = None
        bits = self._bits(given, teacher_bits, teacher_max_kl)
        teaching = teaching_of(
            self,
            given,
            bits=bits,
            processing=teacher_processing_class,
            routes=routes,
            inside=bool(compared),
        )
        self.data_collator = teaching.collator or self.data_collator
        self.teachers = list(teaching.models)
        self.teacher = teaching.alone
        self.kept_answers = teaching.origin
        self.objective = Objective(
            head,
            teaching.asked,
            normalized(teacher_weights, len(teaching.asked)),
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
                "`matches` with a projection under FSDP: its optimizer takes parameters of the model "
                "only. Use DDP, or match layers of equal width."
            )
        self.annealed: Mapping[str, float] = {}  # `alpha` and `temperature` in place of those of `args`
        self._student_writes = False
        # A copy of the student agrees with it until the student moves: that is no mistake.
        differs = from_student or translated
        self.records = Records(self.args.device, self._summed, differs=differs)
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
        columns.extend(each for each in self._columns if each not in columns)

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
            self.records.add(sums, written=self._student_writes)
        else:
            self.records.evaluation.add(sums)
        return (loss, outputs) if return_outputs else loss

    def _mix(self, *, training: bool) -> tuple[float, Divergence]:
        annealed = self.annealed if training else {}
        divergence = self.args.make_divergence()
        if "temperature" in annealed:
            divergence = replace(divergence, temperature=annealed["temperature"])
        return annealed.get("alpha", self.args.alpha), divergence

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer below does; nothing stays attached to the models, or annealed."""
        weights = dict(self.matching.weights)
        try:
            return super().train(*args, **kwargs)
        finally:
            self.matching.stop()
            self.annealed = {}
            self.matching.weights.update(weights)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # the training log, which every process writes
            logs.update(self.records.trained(agreement=self.objective.agreement))
            logs.update(self.matching.means(self._summed))
        if "loss" in logs or "train_loss" in logs:
            self.records.forget()
            self.matching.forget()
        super().log(logs, start_time)

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
