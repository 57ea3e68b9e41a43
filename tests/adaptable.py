"""Tiny models that a LoRA can be trained on, also over a base in 8 or 4 bit: they are 64 wide."""

import pytest
import torch
from tiny import tiny_bert, tiny_llama
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
)


def tiny_gpt2():
    torch.manual_seed(0)
    # As wide as it is high, so that a transposed weight would load.
    return GPT2LMHeadModel(GPT2Config(vocab_size=96, n_positions=32, n_embd=64, n_layer=1, n_head=4))


MODELS = {
    "llama": (AutoModelForCausalLM, lambda: tiny_llama(hidden=64, layers=1)),
    "gpt2": (AutoModelForCausalLM, tiny_gpt2),
    "bert": (AutoModelForSequenceClassification, lambda: tiny_bert(hidden=64, layers=1)),
}
CASES = pytest.mark.parametrize("name", MODELS)
