"""Tiny language models with tokenizers of their own, and prose in the student's tokens."""

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM
from vocabularies import TEXTS, bytes_of_gpt2, pieces_of_llama2

from hf_compress import DistillationArguments, DistillationTrainer

OURS, THEIRS = bytes_of_gpt2(), pieces_of_llama2()


def model(tokenizer, seed=0, layers=1, **config):
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            num_hidden_layers=layers,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=128,
            pad_token_id=0,
            initializer_range=0.3,
            **config,
        )
    )


def rows(count=16):
    """Ragged, each with the beginning of a text as its prompt; two neighbours have no label at all."""
    texts = [text[: 40 + 7 * (i % 5)] for i, text in enumerate(TEXTS[:count])]
    ids = [OURS(text)["input_ids"] for text in texts]
    prompts = [len(row) if i in (2, 3) else 2 + i % 4 for i, row in enumerate(ids)]
    return Dataset.from_dict(
        {
            "input_ids": ids,
            "attention_mask": [[1] * len(row) for row in ids],
            "labels": [
                [-100] * prompt + row[prompt:] for row, prompt in zip(ids, prompts, strict=True)
            ],
        }
    )


def pad(features):
    """To the longest, by hand, labels included."""
    length = max(len(row["input_ids"]) for row in features)
    filling = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {
        name: torch.tensor([row[name] + [value] * (length - len(row[name])) for row in features])
        for name, value in filling.items()
    }


def trainer(folder, student=None, teacher=None, *, theirs=THEIRS, trainer=None, **settings):
    defaults = {
        "per_device_train_batch_size": 8,
        "max_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "max_grad_norm": 1e9,
        "train_sampling_strategy": "sequential",
    }
    return DistillationTrainer(
        model(OURS) if student is None else student,
        DistillationArguments(str(folder), **(defaults | settings)),
        **(
            {
                "teacher": model(theirs, seed=1) if teacher is None else teacher,
                "train_dataset": rows(),
                "processing_class": OURS,
                "teacher_processing_class": theirs,
                "data_collator": pad,
            }
            | (trainer or {})
        ),
    )
