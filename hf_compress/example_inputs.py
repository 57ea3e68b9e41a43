"""Inputs of the right kinds and shapes for a model, from its config alone."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

TOKENS, SAMPLES, PIXELS = 128, 16_000, 224
"""What a row has where nothing else is said: of text, of sound (a second at 16 kHz), of an image along
each side."""


def example_inputs(
    model: PreTrainedModel, *, batch: int = 1, length: int | None = None
) -> dict[str, Tensor]:
    """Keyword tensors for `model(**inputs)`, on the CPU: random tokens, none masked, or noise.

    Text is `input_ids` and `attention_mask` of shape (batch, length); an image `pixel_values` of
    (batch, channels, height, width); sound `input_values` of (batch, length), or a spectrogram.

    length: tokens of text or samples of sound, by default `TOKENS` and `SAMPLES`, or as many as the
        model takes if that is less. Images and spectrograms have the size that the model is for.

    Raises ValueError for numbers below 1, a `length` of what has none or above what the model takes,
    and models of other inputs.
    """
    for name, value in (("batch", batch), ("length", length)):
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    kind, config = model.main_input_name, model.config
    if kind == "input_ids":
        shape = (batch, _tokens(config, length))
        shapes: dict[str, Sequence[int]] = {kind: shape}
        if "attention_mask" in inspect.signature(model.forward).parameters:
            shapes["attention_mask"] = shape
        return inputs_of_shapes(model, shapes)
    if kind == "input_values" and not hasattr(config, "num_mel_bins"):
        return inputs_of_shapes(model, {kind: (batch, length or SAMPLES)})
    if length is not None:
        raise ValueError(
            f"`length` is {length}, and the {kind} of {type(model).__name__} have the size that the "
            "model is for: leave it out."
        )
    return inputs_of_shapes(model, {kind: (batch, *_size(model, kind))})


def inputs_of_shapes(model: PreTrainedModel, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Of these shapes: tokens of the vocabulary, nothing masked, and noise for what is no number."""
    made = {}
    for name, shape in shapes.items():
        if name == "input_ids":
            made[name] = torch.randint(model.config.get_text_config().vocab_size, tuple(shape))
        elif name.endswith("mask"):
            made[name] = torch.ones(tuple(shape), dtype=torch.long)
        elif name.endswith("ids"):
            made[name] = torch.zeros(tuple(shape), dtype=torch.long)
        else:
            made[name] = torch.randn(tuple(shape))
    return made


def _tokens(config: Any, length: int | None) -> int:
    # Not every architecture counts positions.
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    if length is None:
        return min(TOKENS, most or TOKENS)
    if most is not None and length > most:
        raise ValueError(f"`length` is {length}, and the model has {most} positions.")
    return length


def _size(model: PreTrainedModel, kind: str) -> tuple[int, ...]:
    """Of one row, without its batch."""
    config: Any = model.config
    if kind == "pixel_values":
        size = getattr(config, "image_size", PIXELS)
        height, width = (size, size) if isinstance(size, int) else size
        return config.num_channels, height, width
    if kind == "input_values":
        return config.max_length, config.num_mel_bins
    known = ("num_mel_bins", "max_source_positions")
    if kind == "input_features" and all(hasattr(config, name) for name in known):
        # The first convolutions halve the frames.
        return config.num_mel_bins, 2 * config.max_source_positions
    raise ValueError(
        f"{type(model).__name__} takes {kind}, whose shape is not known here: make a batch of your own."
    )
