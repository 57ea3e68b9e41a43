"""Students and teachers of several architectures with a padded batch, and the loss of matches on it."""

import torch
from tiny import random_images, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5, tiny_vit

from hf_compress.distillation.features.matching import FeatureMatching

ROWS, LENGTH = 3, 7
LENGTHS = (7, 4, 5)


def text_batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 90, (ROWS, LENGTH), generator=generator)
    mask = (torch.arange(LENGTH) < torch.tensor(LENGTHS)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def seq2seq_batch():
    batch = text_batch()
    labels = torch.randint(5, 90, (ROWS, 5), generator=torch.Generator().manual_seed(3))
    labels[1, 3:] = -100
    return {**batch, "labels": labels}


def image_batch():
    return {"pixel_values": random_images(ROWS)}


def spread(model):
    """Weights so large that no two tokens, layers and heads look alike."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in name and "shared" not in name:
                parameter.mul_(8)
    return model


# name: (how to make a model of so many layers and such a seed, a batch)
MODELS = {
    "bert": (tiny_bert, text_batch),
    "gpt2": (tiny_gpt2, text_batch),
    "llama": (tiny_llama, text_batch),
    "vit": (tiny_vit, image_batch),
    "t5": (tiny_t5, seq2seq_batch),
}


def make(name, student=2, teacher=4):
    make_model, batch = MODELS[name]
    pair = make_model(layers=student, seed=0), make_model(layers=teacher, seed=1)
    return (*(spread(model).eval() for model in pair), batch())


def identity(values):
    return values


def match_loss(student, teacher, batch, matches, prepare=identity):
    """The weighted loss of one batch, which is the whole step. prepare: changes the matching before."""
    matching = FeatureMatching(student, teacher, matches, device=torch.device("cpu"))
    prepare(matching)
    matching.count([batch], identity)
    matching.start(student)
    try:
        student(**batch)
        with torch.no_grad():
            teacher(**batch)
        return matching.loss(batch, processes=1)
    finally:
        matching.stop()
