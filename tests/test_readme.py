"""Every block of Python in the README runs, on tiny models, in a folder of its own."""

import re
import types
from pathlib import Path

import pytest
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from publishing.runs import score
from tiny import tiny_llama
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments
from vocabularies import TEXTS, wordpiece

from hf_compress import PruningCallback

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
ALL = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
# The one that needs a Hub is run where there is one, in tests/publishing/test_push.py.
BLOCKS = [block for block in ALL if "private=True" not in block]
GIVEN = ("AutoModelForCausalLM", "AutoModelForSequenceClassification", "Trainer", "TrainingArguments")


def classifier(tokenizer):
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=128,
            max_position_embeddings=32,
            num_labels=3,
        )
    )


def rows(tokenizer):
    texts = TEXTS[:48]
    encoded = tokenizer(texts, padding="max_length", max_length=16, truncation=True)
    columns = {name: encoded[name] for name in ("input_ids", "attention_mask")}
    return Dataset.from_dict(columns | {"labels": [len(text) % 3 for text in texts]})


def sparse(folder):
    """A saved classifier whose matrices are half zero."""
    model = classifier(wordpiece())
    with torch.no_grad():
        for name, param in model.named_parameters():
            if name.endswith("dense.weight"):
                param.mul_(torch.rand_like(param) < 0.5)
    model.save_pretrained(folder)
    return model


@pytest.fixture
def names(tmp_path, monkeypatch):
    """What the README takes as given: the reader's model, data and Trainer."""
    monkeypatch.chdir(tmp_path)
    tokenizer = wordpiece()
    model, data = classifier(tokenizer), rows(tokenizer)
    args = TrainingArguments(
        "training",
        max_steps=12,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    batches = list(DataLoader(data.with_format("torch"), batch_size=8))
    trainer = Trainer(
        model,
        args,
        train_dataset=data,
        eval_dataset=data,
        processing_class=tokenizer,
        compute_metrics=score,
        callbacks=[PruningCallback(0.5)],
    )
    tiny_llama(hidden=64).save_pretrained("org/model")
    classifier(tokenizer).save_pretrained("org/classifier")
    return {
        **{name: getattr(transformers, name) for name in GIVEN},
        "LoraConfig": LoraConfig,
        "PruningCallback": PruningCallback,
        "args": args,
        "batches": batches,
        "data": data,
        "dense_model": classifier(tokenizer),
        "get_peft_model": get_peft_model,
        "loader": list(batches * 2),
        "max_steps": 2 * len(batches),
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters()),
        "peft_model": get_peft_model(
            sparse("sparse"), LoraConfig(target_modules=["query", "intermediate.dense"])
        ),
        "teacher": classifier(tokenizer),
        "texts": TEXTS[:20],
        "tokenizer": tokenizer,
        "trainer": trainer,
    }


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.strip().splitlines()[-1][:60])
def test_the_readme_runs(block, names):
    reader = types.ModuleType("reader")
    vars(reader).update(names)
    exec(compile(block, "README.md", "exec"), vars(reader))


def test_the_blocks_were_found():
    assert len(BLOCKS) >= 8
