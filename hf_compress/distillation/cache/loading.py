"""Teachers and rows, outside of a training."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import (
    AutoConfig,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    SequenceFeatureExtractor,
    default_data_collator,
)

from hf_compress.devices import processes
from hf_compress.distillation.cache.asking import Collate
from hf_compress.distillation.tasks.heads import HEADS, Head, head_of
from hf_compress.distillation.teacher import accepted_inputs, load_teacher


def loaded(teacher: nn.Module | str, bits: int | None) -> tuple[nn.Module, Head]:
    """A teacher that is asked outside of a training, and its head.

    A module without `bits` is left as it is, where it is; else as `load_teacher`, with the class that a
    checkpoint was saved as. Raises ValueError where that has no head that is known.
    """
    if not isinstance(teacher, str):
        if bits is None and isinstance(teacher, nn.Module):
            return teacher, head_of(teacher)
        head = head_of(teacher)
    else:
        architectures = AutoConfig.from_pretrained(teacher).architectures or []
        heads = [head for head in HEADS if head.class_names.intersection(architectures)]
        if not heads:
            raise ValueError(
                f"The teacher {teacher!r} was saved as {', '.join(architectures) or 'an unknown class'}"
                ", whose head is not known. Pass the model itself, with a head that is."
            )
        head = heads[0]
    model = load_teacher(teacher, head, bits=bits, device=processes().device)
    return model, head_of(model)


def used_columns(names: Iterable[str], model: nn.Module, head: Head) -> list[str]:
    """Those of a dataset that Trainer would keep for `model`."""
    used = {*accepted_inputs(model, dict.fromkeys(names)), *head.labels, "label", "label_ids"}
    return [name for name in names if name in used]


def default_collator(processing: Any) -> Collate:
    """The one that Trainer would choose."""
    padding: Any = processing
    if isinstance(processing, (PreTrainedTokenizerBase, SequenceFeatureExtractor)):
        return DataCollatorWithPadding(padding)
    return default_data_collator
