"""How a training is taught: by models in memory, across tokenizers, or by answers that were kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from hf_compress.devices import host
from hf_compress.distillation.cache.teacher import cached_teacher
from hf_compress.distillation.routing import Routes, routed
from hf_compress.distillation.sharding import shard_
from hf_compress.distillation.tasks.heads import head_of
from hf_compress.distillation.teachers import Teaching, ask
from hf_compress.distillation.translation.teacher import translated_teacher
from hf_compress.targets import without_adapters


def teaching_of(
    trainer: Any,
    given: Sequence[nn.Module | str],
    *,
    bits: int | None,
    processing: Any,
    routes: Routes | None,
    inside: bool,
) -> Teaching:
    """The teaching of the student of `trainer`, which has its model, arguments, datasets and collator.

    given: the teachers, each a module, a path or id, or "base", or ["cached"], cut into shards where
    FSDP2 cuts the student; bits: as in `load_teacher`; processing: their tokenizer where it is not the
    student's, else None; routes: by which each row has a teacher of its own, None for all teachers of
    all rows; inside: whether the inside of the teacher is compared too.

    Raises ValueError where that cannot be, or the teachers do not fit, and what they raise themselves.
    """
    sharded = trainer.accelerator.is_fsdp2
    # What is cut into shards goes to its device in parts.
    device = host() if sharded else trainer.args.device
    if processing is not None:
        teaching = translated_teacher(
            trainer.model,
            given,
            trainer.data_collator,
            ours=trainer.processing_class,
            theirs=processing,
            across=trainer.args.across_tokenizers,
            bits=bits,
            device=device,
        )
    elif list(given) == ["cached"]:
        teaching = cached_teacher(
            trainer.model,
            [trainer.train_dataset, trainer.eval_dataset],
            trainer.data_collator,
            bits=bits,
            inside=inside,
        )
    else:
        teaching = ask(
            given,
            trainer.model,
            head_of(trainer.model),
            bits=bits,
            device=device,
            processing=trainer.processing_class,
        )
    if routes is not None:
        routes.check([trainer.train_dataset, trainer.eval_dataset])
        teaching = routed(teaching, routes, trainer.data_collator, sharded=sharded)
    if sharded:
        for model in teaching.models:
            if model is not without_adapters(trainer.model):  # which is sharded as the student
                shard_(model, trainer.accelerator)
    if inside and teaching.inside is None:
        raise ValueError("`matches` need one teacher's layers, not those of 'base' or several.")
    return teaching
