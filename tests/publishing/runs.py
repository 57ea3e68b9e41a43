"""What the tests of publishing share: a short training, its score, and what is read back."""

import json

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TrainingArguments

from hf_compress.metrics.functions import accuracy

IDS = torch.arange(5, 17)[None]
WRITTEN = {"README.md", "report.json", "config.json", "model.safetensors"}


def settings(path, kind=TrainingArguments, steps=16, **arguments):
    return kind(
        path,
        max_steps=steps,
        logging_steps=2,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **arguments,
    )


def score(prediction):
    return {"accuracy": accuracy(prediction.predictions.argmax(-1), prediction.label_ids)}


def tokenizer():
    words = {f"w{i}": i for i in range(90)} | {"[UNK]": 90, "[PAD]": 91}
    inner = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", pad_token="[PAD]")


def read(folder):
    return json.loads((folder / "report.json").read_text())


def never(model):
    raise AssertionError("work began before the refusal")
