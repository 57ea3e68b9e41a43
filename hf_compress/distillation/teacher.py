"""The model that is imitated: loaded, frozen, placed, and checked against its student."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.utils.quantization_config import QuantizationMethod

from hf_compress.distillation.alignment import Classes, label_classes, vocabulary_classes
from hf_compress.distillation.tasks.heads import Head, head_of
from hf_compress.frozen import freeze_
from hf_compress.targets import without_adapters


def load_teacher(
    teacher: nn.Module | str, head: Head, *, bits: int | None, device: torch.device
) -> nn.Module:
    """The frozen teacher on `device`, in eval mode.

    teacher: a module, which is frozen and moved in place, or a path or hub id, loaded with the class
    of `head`. bits: 8 or 4 loads it through bitsandbytes (a module by way of a temporary folder, so
    that the module itself stays as it is); None keeps its precision.

    Raises TypeError for anything else, ValueError for other `bits`, a checkpoint without a trained
    head of this kind, or a module that cannot be quantized.
    """
    if bits not in (None, 4, 8):
        raise ValueError(f"`teacher_bits` must be 8, 4 or None, got {bits!r}.")
    if isinstance(teacher, str):
        _check_checkpoint(teacher, head)
        teacher = (
            head.auto_class.from_pretrained(teacher)
            if bits is None
            else _load_quantized(teacher, head, bits)
        )
    elif not isinstance(teacher, nn.Module):
        raise TypeError(
            "`teacher` must be a model, a path, a hub id, 'self' or 'base', got "
            f"{type(teacher).__name__}."
        )
    elif bits is not None:
        teacher = _requantize(teacher, head, bits)
    if not _is_bnb(teacher) and not hasattr(teacher, "hf_device_map"):
        teacher.to(device)
    return freeze_(teacher)


def accepted_inputs(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Those entries of `batch` that the forward of `model` names: a DistilBERT gets no token types."""
    names = inspect.signature(without_adapters(model).forward).parameters
    return {name: value for name, value in batch.items() if name in names}


def check_pair(student: nn.Module, teacher: nn.Module, processing: Any = None) -> Classes | None:
    """The teacher's classes that are the student's, in their order; None for all as they are.

    processing: the student's tokenizer or processor, if any, needed where one vocabulary is padded.
    Raises ValueError where `teacher` cannot teach `student`, or would learn with it.
    """
    head = check_separate(student, teacher)
    ours, theirs = without_adapters(student).config, without_adapters(teacher).config
    for name in head.same:
        _check_equal("config", f"as its {name}", getattr(ours, name, None), getattr(theirs, name, None))
    if head.predicts_labels:
        _check_equal("head", "labels", ours.num_labels, theirs.num_labels)
        if None not in (ours.problem_type, theirs.problem_type):
            _check_equal("head", "as its problem_type", ours.problem_type, theirs.problem_type)
    tokens = None
    if head.reads_text or head.writes_text:
        tokens = vocabulary_classes(
            vocabulary_size(ours), vocabulary_size(theirs), processing, theirs.name_or_path
        )
    if head.predicts_labels:
        return label_classes(ours.id2label, theirs.id2label)
    return tokens if head.writes_text else None


def check_separate(student: nn.Module, teacher: nn.Module) -> Head:
    """The head of both. Raises ValueError where it is not the same, or where they share weights."""
    student_parameters = {id(parameter) for parameter in student.parameters()}
    if any(id(parameter) in student_parameters for parameter in teacher.parameters()):
        raise ValueError(
            "The teacher is the student, or shares weights with it, so it would change with every "
            "step. For the student as it is now pass teacher='self', for the base of its adapters "
            "teacher='base'; else pass a copy.deepcopy."
        )
    head, other = head_of(student), head_of(teacher)
    if head is not other:
        raise ValueError(f"The student's head is for {head.name}, the teacher's for {other.name}.")
    return head


def _check_equal(what: str, unit: str, ours: Any, theirs: Any) -> None:
    if ours != theirs:
        raise ValueError(
            f"The student's {what} has {ours} {unit}, the teacher's {theirs}: their outputs cannot be "
            "compared. Choose a teacher with the same, or build the student from the teacher's config."
        )


def vocabulary_size(config: Any) -> int | None:
    """Of what a model with this config writes, or else reads; None for one without text."""
    text = config.get_text_config(decoder=True)
    # Marian may write with another vocabulary than it reads with.
    return getattr(text, "decoder_vocab_size", None) or getattr(text, "vocab_size", None)


def _check_checkpoint(path: str, head: Head) -> None:
    # from_pretrained would only warn, and teach from a randomly initialised head.
    architectures = AutoConfig.from_pretrained(path).architectures or []
    if not head.class_names.intersection(architectures):
        raise ValueError(
            f"The teacher {path!r} was saved as {', '.join(architectures) or 'an unknown class'} and "
            f"has no trained head for {head.name}. Fine-tune it first, or pass the model itself."
        )


def _load_quantized(path: str, head: Head, bits: int) -> nn.Module:
    from hf_compress.quantization.bnb import load_quantized

    return load_quantized(path, bits, head.auto_class)


def _requantize(model: nn.Module, head: Head, bits: int) -> nn.Module:
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"`teacher_bits={bits}` needs a transformers model to quantize, got "
            f"{type(model).__name__}. Merge a PEFT model first (merge_and_unload)."
        )
    if getattr(model, "quantization_method", None) is not None:
        raise ValueError(
            f"The teacher is already quantized ({model.quantization_method}); leave out `teacher_bits`."
        )
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return _load_quantized(folder, head, bits)


def _is_bnb(model: nn.Module) -> bool:
    # The test Trainer uses: bitsandbytes models refuse to be moved.
    return getattr(model, "quantization_method", None) == QuantizationMethod.BITS_AND_BYTES
