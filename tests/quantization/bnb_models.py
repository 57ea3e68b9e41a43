"""Tiny models that bitsandbytes can pack, and what they answer."""

import torch
from tiny import tiny_bert, tiny_llama
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

IDS = torch.arange(5, 17)[None]
ON_CPU = not torch.cuda.is_available()


def classifier():
    return AutoModelForSequenceClassification, tiny_bert(hidden=64)


def language_model():
    return AutoModelForCausalLM, tiny_llama(hidden=64)


def tied_language_model():
    return AutoModelForCausalLM, tiny_llama(hidden=64, tie_word_embeddings=True)


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS.to(model.device)).logits.cpu()
