"""Shared by the benchmarks on Reuters R8: data, the fine-tuned dense MiniLM, and its training."""

import os
from pathlib import Path

from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from hf_compress.samples import corpus, minilm

CACHE = Path(os.environ.get("HF_COMPRESS_CACHE", Path.home() / ".cache" / "hf_compress"))


def load(length):
    """Tokenizer, tokenized train and test split, label names."""
    tokenizer = AutoTokenizer.from_pretrained(minilm())
    data = corpus("reuters-r8").rename_column("label", "labels")
    names = data["train"].features["labels"].names
    data = data.map(
        lambda rows: tokenizer(rows["text"], truncation=True, max_length=length),
        batched=True,
        remove_columns="text",
    )
    return tokenizer, data["train"], data["test"], names


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def trainer(model, output, tokenizer, train, test, callbacks=None, seed=0, **arguments):
    settings = {
        "num_train_epochs": 1,
        "learning_rate": 1e-4,
        "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 64,
        "warmup_steps": 0.1,
        "save_strategy": "no",
        "logging_steps": 20,
        "report_to": "none",
        "seed": seed,
    }
    return Trainer(
        model,
        TrainingArguments(output, **(settings | arguments)),
        train_dataset=train,
        eval_dataset=test,
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=accuracy,
        callbacks=callbacks,
    )


def classifier(folder, names):
    return AutoModelForSequenceClassification.from_pretrained(
        folder,
        num_labels=len(names),
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
    )


def dense(tokenizer, train, test, names, *, length, epochs):
    """Folder of MiniLM fine-tuned on R8; trained once and kept in the cache."""
    folder = CACHE / f"r8-dense-{length}-tokens-{epochs}-epochs"
    if not (folder / "config.json").exists():
        fine = trainer(
            classifier(minilm(), names),
            CACHE / "tmp",
            tokenizer,
            train,
            test,
            num_train_epochs=epochs,
            learning_rate=2e-4,
        )
        fine.train()
        fine.save_model(folder)
    return folder
