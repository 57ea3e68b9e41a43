"""Calibration data in one batch, ragged where it is text, for each tiny architecture."""

import torch
from tiny import (
    VOCABULARY,
    random_images,
    random_sound,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_t5,
    tiny_vit,
    tiny_whisper,
)

ROWS, LENGTH = 12, 10


def tokens(seed=1, rows=ROWS):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, VOCABULARY, (rows, LENGTH), generator=generator)


def mask(seed=2, rows=ROWS):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, LENGTH + 1, (rows, 1), generator=generator)
    return (torch.arange(LENGTH) < lengths).long()


def text():
    return {"input_ids": tokens(), "attention_mask": mask()}


def pairs():
    return text() | {"decoder_input_ids": tokens(3), "decoder_attention_mask": mask(4)}


def images():
    return {"pixel_values": random_images(ROWS, seed=5)}


def speech():
    return {"input_features": random_sound(ROWS, seed=6), "decoder_input_ids": tokens(3)}


# The model, and its calibration in one batch.
ARCHITECTURES = {
    "bert": (tiny_bert, text),
    "gpt2": (tiny_gpt2, text),
    "llama": (tiny_llama, text),
    "t5": (tiny_t5, pairs),
    "vit": (tiny_vit, images),
    "whisper": (tiny_whisper, speech),
}


def build(name):
    model, batch = ARCHITECTURES[name]
    return model(), batch()
