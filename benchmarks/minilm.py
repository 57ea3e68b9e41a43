"""Shared by the benchmarks that fine-tune MiniLM: data, the dense model, and its training."""

import json
import os
from pathlib import Path

import torch
from datasets import DatasetDict
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from hf_compress import DistillationArguments, DistillationTrainer
from hf_compress.samples import corpus, minilm

CACHE = Path(os.environ.get("HF_COMPRESS_CACHE", Path.home() / ".cache" / "hf_compress"))


def load(name, length, rows=None):
    """Tokenizer, tokenized train and test split of a corpus, label names. rows: so many at random."""
    tokenizer = AutoTokenizer.from_pretrained(minilm())
    data = corpus(name).rename_column("label", "labels")
    labels = data["train"].features["labels"].names
    if rows is not None:
        data = DatasetDict({s: part.shuffle(seed=0).select(range(rows)) for s, part in data.items()})
    data = data.map(
        lambda rows: tokenizer(rows["text"], truncation=True, max_length=length),
        batched=True,
        remove_columns="text",
    )
    return tokenizer, data["train"], data["test"], labels


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def trainer(
    model, output, tokenizer, train, test, callbacks=None, seed=0, teacher=None, matches=(), **arguments
):
    """A Trainer, or with a `teacher` a DistillationTrainer, whose `alpha` and `temperature` are among
    the arguments."""
    settings = {
        "num_train_epochs": 1,
        "learning_rate": 1e-4,
        "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 64,
        "warmup_steps": 0.1,
        "save_strategy": "no",
        "logging_steps": 20,
        "report_to": "none",
        "use_cpu": not torch.cuda.is_available(),  # bf16 on a CPU asks for it
        "seed": seed,
    } | arguments
    shared = {
        "train_dataset": train,
        "eval_dataset": test,
        "processing_class": tokenizer,
        "data_collator": DataCollatorWithPadding(tokenizer),
        "compute_metrics": accuracy,
        "callbacks": callbacks,
    }
    if teacher is None:
        return Trainer(model, TrainingArguments(output, **settings), **shared)
    return DistillationTrainer(
        model, DistillationArguments(output, **settings), teacher=teacher, matches=matches, **shared
    )


def classifier(folder, names):
    return AutoModelForSequenceClassification.from_pretrained(
        folder,
        num_labels=len(names),
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
    )


def dense(
    corpus_name, tokenizer, train, test, names, *, length, epochs, learning_rate=1e-4, bf16=False
):
    """Folder of MiniLM fine-tuned on the rows; trained once and kept in the cache."""
    settings = (length, "tokens", epochs, "epochs", len(train), "rows", learning_rate)
    settings += ("bf16",) if bf16 else ()
    folder = CACHE / "-".join(map(str, (corpus_name, *settings)))
    if not (folder / "config.json").exists():
        fine = trainer(
            classifier(minilm(), names),
            CACHE / "tmp",
            tokenizer,
            train,
            test,
            num_train_epochs=epochs,
            learning_rate=learning_rate,
            bf16=bf16,
        )
        fine.train()
        fine.save_model(folder)
    return folder


def add_dense_arguments(parser, *, length=64, epochs=3, learning_rate=2e-4):
    """The options of `dense_of`; its defaults here."""
    parser.add_argument("--rows", type=int, help="of each split, at random; all by default")
    parser.add_argument("--length", type=int, default=length, help="tokens for each row")
    parser.add_argument("--dense_epochs", type=int, default=epochs)
    parser.add_argument("--dense_learning_rate", type=float, default=learning_rate)
    parser.add_argument("--bf16", action="store_true", help="autocast, faster where the CPU has it")


def dense_of(corpus_name, options):
    """What `load` gives, and the folder of the `dense` model."""
    data = load(corpus_name, options.length, options.rows)
    folder = dense(
        corpus_name,
        *data,
        length=options.length,
        epochs=options.dense_epochs,
        learning_rate=options.dense_learning_rate,
        bf16=options.bf16,
    )
    return data, folder


def accuracy_of(folder, tokenizer, train, test, names):
    """Test accuracy of the classifier in `folder`, in fp32."""
    return trainer(classifier(folder, names), CACHE / "tmp", tokenizer, train, test).evaluate()[
        "eval_accuracy"
    ]


def cached(file, make):
    """What `make` returned the first time, kept as JSON in `file`."""
    if not file.exists():
        found = make()
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(found))
    return json.loads(file.read_text())
