"""When the loss is computed without the logits, and how the forwards of the models make way for it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from accelerate.utils import extract_model_from_parallel
from accelerate.utils.other import is_compiled_module
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_compress.devices import is_host
from hf_compress.distillation.alignment import Classes
from hf_compress.distillation.cache.teacher import CachedTeacher
from hf_compress.distillation.chunked import Taught, chunked_sums
from hf_compress.distillation.divergences import Divergence
from hf_compress.distillation.output_layer import OutputLayer
from hf_compress.distillation.tap import CannotTap, Tap, check_layer, tap
from hf_compress.distillation.tasks.labelled import IGNORED, Labelled
from hf_compress.distillation.tasks.task import Batch, Sums, Task
from hf_compress.distillation.teachers import BaseTeacher, FrozenTeacher, Teacher
from hf_compress.targets import without_adapters

logger = logging.getLogger(__name__)

LOGITS, GPU_LOGITS = 2**23, 2**26
"""How many logits "auto" holds of one model at a time, on a CPU and on what else there is.

On CPUs fewer would take longer, and more are no faster (measured, benchmarks/chunked_loss.py). GPUs are
not measured yet: theirs is of 512 items at 128k classes, which keep one busy, in 256 MiB.
"""

_Model = FrozenTeacher | BaseTeacher


class Chunking:
    """The loss of language models from their hidden states, wherever that is possible.

    chunk_size: how many items have logits at one time; "auto": as many as `LOGITS` are of, and batches
    of no more are left whole; None: all are.

    The student's loss is computed within its forward, in a hook on its output layer, and is an output
    of the model that DDP or FSDP2 has wrapped: they see every use of its weights.
    """

    def __init__(
        self,
        teachers: Sequence[Teacher],
        weights: Sequence[float],
        autocast: Callable[[], AbstractContextManager],
        chunk_size: int | str | None,
    ) -> None:
        self._teachers = tuple(teachers)
        self._weights = tuple(weights)
        self._autocast = autocast
        self._chunk_size = chunk_size
        self._taps: tuple[Tap, list[tuple[Teacher, Tap | None]]] | None = None
        self._impossible = chunk_size is None

    def takes(self, model: nn.Module, features: Mapping[str, Any], task: Task, batch: Batch) -> bool:
        """Whether `sums` can do without the logits of `batch`, and it is worth it.

        The first time it may run the models, in evaluation mode, to see how they make their logits. Why
        these cannot be left out is logged, once.
        """
        if self._impossible:
            return False
        try:
            if not isinstance(task, Labelled):
                raise CannotTap(f"{task.name} needs them")
            head = _output_layer(model)
            if self._chunk_size == "auto":
                small = task.labels(batch).numel() <= automatic_size(head)
                # Where weights are sharded all processes must do the same.
                if small and not any(_is_sharded(each) for each in self._models(model)):
                    return False
            if self._taps is None or self._taps[0].head is not head:  # another model is evaluated
                self._taps = self._find(model, features)
        except CannotTap as reason:
            self._impossible = True
            level = logging.INFO if self._chunk_size == "auto" else logging.WARNING
            logger.log(level, "The logits are held whole, not in chunks: %s.", reason)
        return not self._impossible

    def sums(
        self,
        model: nn.Module,
        features: Mapping[str, Any],
        task: Task,
        batch: Batch,
        *,
        asked: Mapping[str, Any],
        divergence: Divergence,
        alpha: float,
        rows: int | None = None,
    ) -> tuple[Sums, Any]:
        """The totals as of `task.sums`, to be mixed by `alpha`, and the output of the student, whose
        logits are of no position. Only of what it `takes`; asked: what the teachers are given."""
        assert self._taps is not None
        assert isinstance(task, Labelled)
        ours, teachers = self._taps
        size = self._chunk_size if isinstance(self._chunk_size, int) else automatic_size(ours.head)
        labels = task.labels(batch)[:rows]

        def of_labels(hidden: Tensor) -> Tensor:
            # Hidden states stand where their logits would.
            return task.logits(SimpleNamespace(logits=hidden))[:rows]

        with self._autocast():
            taught = [
                _ask(teacher, theirs, asked, of_labels, labels != IGNORED, task.name)
                for teacher, theirs in teachers
            ]
        answers: list[Sums] = []

        def answer(hidden: Tensor) -> None:
            sums = chunked_sums(
                of_labels(hidden),
                ours.layer(),
                [each() for each in taught],
                labels,
                labels != IGNORED,
                divergence=divergence,
                alpha=alpha,
                chunk_size=size,
                weights=self._weights,
            )
            answers.append(sums)

        with ours.taking(answer), _returning(_unwrapped(model), answers):
            output, sums = model(**features)
        return sums, output

    def _find(
        self, model: nn.Module, features: Mapping[str, Any]
    ) -> tuple[Tap, list[tuple[Teacher, Tap | None]]]:
        if "labels" in features:
            raise CannotTap("the model itself is given the labels, and makes a loss of its logits")
        student = _unwrapped(model)
        with self._autocast():
            theirs = [(teacher, _tapped(teacher, features)) for teacher in self._teachers]
            return tap(student, lambda: student(**features)), theirs

    def _models(self, student: nn.Module) -> list[nn.Module]:
        return [student, *(each.model for each in self._teachers if isinstance(each, _Model))]


def automatic_size(head: nn.Linear) -> int:
    """How many items "auto" projects at one time through an output layer."""
    most = LOGITS if is_host(head.weight.device) else GPU_LOGITS
    return max(1, most // head.out_features)


def _tapped(teacher: Teacher, features: Mapping[str, Any]) -> Tap | None:
    """None for kept answers, which are there without a forward."""
    if isinstance(teacher, CachedTeacher):
        return None
    if not isinstance(teacher, _Model):
        raise CannotTap("each row has a teacher of its own")
    return tap(teacher.model, lambda: teacher(features))


def _ask(
    teacher: Any,
    theirs: Tap | None,
    asked: Mapping[str, Any],
    of_labels: Callable[[Tensor], Tensor],
    counts: Tensor,
    name: str,
) -> Callable[[], Taught]:
    """What `teacher` is found to teach, once the weights of all output layers are at hand."""
    if theirs is None:
        answers = teacher(asked).to_items(counts, name)
        return lambda: answers
    states: list[Tensor] = []
    with theirs.taking(lambda hidden: states.append(of_labels(hidden))):
        teacher(asked)
    return lambda: (states[0], _cut(theirs.layer(), teacher.classes))


def _is_sharded(model: nn.Module) -> bool:
    return any(isinstance(each, DTensor) for each in model.parameters())


def _output_layer(model: nn.Module) -> nn.Linear:
    if is_compiled_module(model) or is_compiled_module(extract_model_from_parallel(model)):
        raise CannotTap("hooks come and go, which a compiled model does not see")
    return check_layer(without_adapters(_unwrapped(model)).get_output_embeddings())


def _unwrapped(model: nn.Module) -> nn.Module:
    return extract_model_from_parallel(model, keep_torch_compile=False)


def _cut(layer: OutputLayer, classes: Classes | None) -> OutputLayer:
    if classes is None:
        return layer
    bias = None if layer.bias is None else layer.bias[classes]
    return replace(layer, weight=layer.weight[classes], bias=bias)


@contextmanager
def _returning(model: nn.Module, answers: list[Sums]) -> Iterator[None]:
    """A forward of `model` returns (its output, the last of `answers`)."""

    def after(module: nn.Module, args: Any, output: Any) -> tuple[Any, Sums]:
        return output, answers.pop()

    # Before the hook of FSDP2, which looks for what gradients will come from.
    handle = model.register_forward_hook(after, prepend=True)
    try:
        yield
    finally:
        handle.remove()
