"""Distillation inside any Trainer: its loop stays, only the loss is ours."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput, has_length

from hf_compress.distillation.arguments import DistillationArgumentsMixin
from hf_compress.distillation.tasks import Sums, Task, head_of, problem_type, without_adapters
from hf_compress.distillation.teacher import accepted_inputs, check_pair, load_teacher, snapshot

logger = logging.getLogger(__name__)


class DistillationMixin(Trainer):
    """Adds a teacher to a Trainer class (papers/1503.02531).

        class DistillSFT(DistillationMixin, SFTTrainer): ...

    The loss is `(1 - alpha) * task + alpha * T^2 * KL(teacher || student)`, each part the mean over the
    items of the whole accumulated batch on all processes: loss and gradients do not depend on how that
    batch is cut. The task's own loss is computed here too, from the logits, since many models ignore
    the item count that Trainer gives them. `loss_task`, `loss_kd` and `agreement` (how often both
    models choose the same class) are logged, and come with evaluation under its prefix.

    teacher: a model (frozen and moved in place), a path or hub id, or "self", a copy of the student as
    it is when the trainer is built: the dense model, when it is pruned later.
    teacher_bits: 8 or 4 loads the teacher through bitsandbytes; None keeps its precision.

    Takes the arguments of the Trainer below it; `args` must have `temperature` and `alpha`
    (`DistillationArguments`). Anything that cannot work raises here, before the first step.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: nn.Module | str | None = None,
        args: Any = None,
        *others: Any,
        teacher: nn.Module | str,
        teacher_bits: int | None = None,
        **trainer_arguments: Any,
    ) -> None:
        if not isinstance(args, DistillationArgumentsMixin):
            raise TypeError(
                f"`args` must have `temperature` and `alpha`, got {type(args).__name__}. Pass a "
                "DistillationArguments, or for another arguments class a dataclass of your own: "
                "class MyArguments(DistillationArgumentsMixin, SFTConfig)."
            )
        if isinstance(teacher, str) and teacher == "self":
            teacher = _copy_of(model)
        super().__init__(model, args, *others, **trainer_arguments)  # type: ignore[arg-type]
        if Version(transformers.__version__) < Version("5.19"):
            # Those versions ask this flag whether the loss is scaled already.
            self.model_accepts_loss_kwargs = True
        _refuse_unsupported(self)

        self.head = head_of(self.model)
        with torch.random.fork_rng(devices=[]):  # loading must not shift the student's randomness
            self.teacher = load_teacher(teacher, self.head, bits=teacher_bits, device=self.args.device)
        check_pair(self.model, self.teacher)
        self._task: Task | None = None
        self._train_sums: Tensor | None = None
        self._eval_sums: Tensor | None = None
        self._compared = teacher == "self"
        self._attach_callbacks()
