"""Tiny random models and data for the suites: built from configs, never downloaded."""

import torch
from datasets import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

VOCABULARY = 96


def tiny_bert(num_labels=3, layers=2, hidden=32, seed=0, **config):
    torch.manual_seed(seed)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            intermediate_size=2 * hidden,
            max_position_embeddings=32,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            num_labels=num_labels,
            **config,
        )
    )


def tiny_llama(kind=LlamaForCausalLM, layers=2, hidden=32, seed=0, **config):
    """`kind` is any Llama class; `LlamaForSequenceClassification` takes `num_labels`."""
    torch.manual_seed(seed)
    return kind(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=2 * hidden,
            max_position_embeddings=64,
            pad_token_id=0,
            **config,
        )
    )


def tiny_llama_classifier(**config):
    return tiny_llama(LlamaForSequenceClassification, **config)


def classification_rows(rows=64, length=12, num_labels=3, seed=0):
    """Rows whose label is a function of their first token, so that a tiny model can learn it.

    Lengths differ from row to row; padding is id 0 with attention mask 0.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCABULARY, (rows, length), generator=generator)
    lengths = torch.randint(4, length + 1, (rows, 1), generator=generator)
    mask = (torch.arange(length) < lengths).long()
    return Dataset.from_dict(
        {
            "input_ids": (ids * mask).tolist(),
            "attention_mask": mask.tolist(),
            "labels": (ids[:, 0] % num_labels).tolist(),
        }
    )


def language_rows(rows=64, length=16, seed=0):
    """Rows of a counting language (each token is the one before plus one), ragged.

    Labels are -100 on padding.
    """
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(5, VOCABULARY, (rows, 1), generator=generator)
    ids = 5 + (start + torch.arange(length)) % (VOCABULARY - 5)
    lengths = torch.randint(4, length + 1, (rows, 1), generator=generator)
    mask = (torch.arange(length) < lengths).long()
    return Dataset.from_dict(
        {
            "input_ids": (ids * mask).tolist(),
            "attention_mask": mask.tolist(),
            "labels": torch.where(mask.bool(), ids, -100).tolist(),
        }
    )
