"""Text that a model writes itself, in the place of that of the data (papers/2306.13649)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, GenerationConfig

from hf_compress.distillation.routing import ROUTES
from hf_compress.distillation.tasks.heads import Head, head_of
from hf_compress.distillation.tasks.labelled import IGNORED
from hf_compress.frozen import evaluating
from hf_compress.targets import without_adapters

Generate = Callable[..., Tensor]

_KNOWN = {"input_ids", "attention_mask", "labels"}
_KEPT = {ROUTES}
"""What of a batch still holds for other text in its rows."""


def check_writes(head: Head) -> None:
    """Raises NotImplementedError for a head that does not write text from text."""
    if head.auto_class not in (AutoModelForCausalLM, AutoModelForSeq2SeqLM):
        raise NotImplementedError(
            f"Only causal and sequence-to-sequence language models write text of their own, not a head "
            f"for {head.name}."
        )


@torch.no_grad()
def rewritten(
    model: Any, batch: Mapping[str, Any], *, temperature: float, beams: int = 1
) -> dict[str, Any]:
    """`batch` with what `model` writes in the place of the labelled tokens of each row, which are its
    labels then. A row without labels stays as it is.

    Of a causal model the prompt is what stands before the first label, at least one token, and the row
    ends with what was written: `input_ids`, `attention_mask` and `labels` (rows, another length), with
    padding on the right. Of a sequence-to-sequence model only the labels are others.

    temperature: 0 takes the most probable token, or sequence with `beams`. What is written ends with
    the end-of-sequence token, or where it is as long as what it replaces.

    Where FSDP2 has cut the weights of `model`, call it on all processes: each goes on until the last
    has written its texts.

    Raises NotImplementedError for another head, and ValueError for a batch of more than tokens, mask
    and labels that is causal.
    """
    head = head_of(model)
    check_writes(head)
    labels = batch["labels"]
    lengths = (labels[:, 1:] if head.auto_class is AutoModelForCausalLM else labels) != IGNORED
    settings = _settings(model, int(lengths.sum(1).max()), temperature, beams)
    limits = lengths.sum(1).tolist()
    writes = any(limits)
    if not writes and not isinstance(model, FSDPModule):
        return dict(batch)
    with evaluating(model), _gathered(model) as generate:
        if not writes:  # but others may, who need the part of the weights that is here
            limits = [1] * len(limits)
        answer = _continued if head.auto_class is AutoModelForCausalLM else _answered
        new = answer(generate, batch, settings, limits)
    return new if writes else dict(batch)


@contextmanager
def _gathered(model: Any) -> Iterator[Generate]:
    """`generate` of `model`, which gathers the shards of FSDP2, if any, as its forward does."""
    if not isinstance(model, FSDPModule):
        yield model.generate
        return
    module: Any = model
    register_fsdp_forward_method(module, "generate")
    try:
        yield partial(vars(model)["generate"], synced_gpus=True)
    finally:
        del vars(model)["generate"]


def _answered(
    generate: Generate, batch: Mapping[str, Any], settings: GenerationConfig, limits: Sequence[int]
) -> dict[str, Any]:
    asked = {k: v for k, v in batch.items() if k not in ("labels", "decoder_input_ids")}
    read = {k: v for k, v in asked.items() if k not in _KEPT}
    written = generate(**read, generation_config=settings)[:, 1:]
    found = [_ended(row, limit, settings) for row, limit in zip(written.tolist(), limits, strict=True)]
    return {**asked, "labels": _padded(found, IGNORED, batch["labels"].device)}


def _continued(
    generate: Generate, batch: Mapping[str, Any], settings: GenerationConfig, limits: Sequence[int]
) -> dict[str, Any]:
    if unknown := sorted(batch.keys() - _KNOWN - _KEPT):
        raise ValueError(
            f"A batch with {', '.join(unknown)} cannot be continued: what the student writes has only "
            f"{', '.join(sorted(_KNOWN))}. Turn packing off, or let the collator leave them out."
        )
    ids, labels = batch["input_ids"], batch["labels"]
    mask = batch.get("attention_mask", torch.ones_like(ids)).bool()
    texts = [row[real].tolist() for row, real in zip(ids, mask, strict=True)]
    starts = [
        max(int((row[real] != IGNORED).int().argmax()), 1) if limit else len(text)
        for row, real, limit, text in zip(labels, mask, limits, texts, strict=True)
    ]
    prompts = [text[:start] for text, start in zip(texts, starts, strict=True)]
    asked = [row for row, limit in enumerate(limits) if limit]
    width = max(len(prompts[row]) for row in asked)
    # Written to the right of the prompts, which therefore end in one place.
    reverse = [prompts[row][::-1] for row in asked]
    written = generate(
        input_ids=_padded(reverse, settings.pad_token_id, ids.device).flip(1),
        attention_mask=_padded([[1] * len(row) for row in reverse], 0, ids.device).flip(1),
        generation_config=settings,
    )[:, width:].tolist()
    new: list[list[int]] = [[]] * len(limits)
    for row, tokens in zip(asked, written, strict=True):
        new[row] = _ended(tokens, limits[row], settings)
    pairs = list(zip(prompts, new, strict=True))
    return {
        **{name: batch[name] for name in _KEPT & batch.keys()},
        "input_ids": _padded([p + w for p, w in pairs], settings.pad_token_id, ids.device),
        "attention_mask": _padded([[1] * len(p + w) for p, w in pairs], 0, ids.device),
        "labels": _padded([[IGNORED] * len(p) + w for p, w in pairs], IGNORED, ids.device),
    }


def _settings(model: Any, longest: int, temperature: float, beams: int) -> GenerationConfig:
    """Of the model's own settings only those of its tokens: nothing may bend its distribution."""
    own = without_adapters(model).generation_config
    ends = own.eos_token_id
    end = ends[0] if isinstance(ends, list) else ends
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    return GenerationConfig(
        max_new_tokens=max(longest, 1),
        num_beams=beams,
        top_k=0,
        top_p=1.0,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        bos_token_id=own.bos_token_id,
        eos_token_id=ends,
        pad_token_id=next((each for each in (own.pad_token_id, end) if each is not None), 0),
        decoder_start_token_id=own.decoder_start_token_id,
        forced_bos_token_id=own.forced_bos_token_id,
        **sampling,
    )


def _ended(tokens: Sequence[int], limit: int, settings: GenerationConfig) -> list[int]:
    ends = settings.eos_token_id
    known = {*ends} if isinstance(ends, list) else {ends}
    found = next((place for place, token in enumerate(tokens) if token in known), len(tokens))
    return list(tokens[: min(found + 1, limit)])


def _padded(rows: Sequence[Sequence[int]], value: int, device: torch.device) -> Tensor:
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    padded = torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)
    return padded.to(device)
