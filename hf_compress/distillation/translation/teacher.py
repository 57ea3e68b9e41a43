"""The teacher that reads the translation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from hf_compress.distillation.tasks.heads import head_of
from hf_compress.distillation.teacher import check_separate, load_teacher
from hf_compress.distillation.teachers import Teaching, answer
from hf_compress.distillation.translation.collator import TRANSLATED, TranslatingCollator
from hf_compress.distillation.translation.pieces import Pieces
from hf_compress.distillation.translation.task import TranslatedCausalLM


class TranslatedTeacher:
    """A `Teacher` with a tokenizer of its own: its outputs are those for its own tokens."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @torch.no_grad()
    def __call__(self, features: Mapping[str, Any]) -> Any:
        return answer(self.model, features[TRANSLATED])


def translated_teacher(
    student: nn.Module,
    given: Sequence[nn.Module | str],
    collate: Any,
    *,
    ours: Any,
    theirs: Any,
    across: str,
    bits: Any,
    device: torch.device,
) -> Teaching:
    """By the one teacher that is `given`, who reads the text of what `collate` makes.

    ours, theirs: the tokenizers; across: as in `TranslatedCausalLM`; bits, device: as in
    `load_teacher`. Raises NotImplementedError for another head than causal language modelling,
    ValueError for several teachers, for one that is made of the student, for tokenizers that cannot be
    compared, and as `load_teacher`.
    """
    head = head_of(student)
    if head.auto_class is not AutoModelForCausalLM:
        raise NotImplementedError(
            "`teacher_processing_class` is for causal language models, but the student's head is for "
            f"{head.name}. Leave it out, and choose a teacher with the student's tokenizer."
        )
    (teacher, *others) = given
    if others or (isinstance(teacher, str) and teacher in ("base", "cached")):
        raise ValueError(
            "`teacher_processing_class` is the tokenizer of one teacher of its own: pass a model, a "
            "path or a hub id, not 'base', 'cached' or several."
        )
    pieces = Pieces(ours, "processing_class"), Pieces(theirs, "teacher_processing_class")
    model: Any = load_teacher(teacher, head, bits=bits, device=device)
    check_separate(student, model)
    longest = getattr(model.config, "max_position_embeddings", None)
    return Teaching(
        asked=[TranslatedTeacher(model)],
        models=[model],
        collator=TranslatingCollator(collate, *pieces, longest),
        task=TranslatedCausalLM(across),
        alone=model,
        inside=model,
    )
