"""Prune and distil a model on a dataset: `hf-compress compress`, and `scripts/compress.py`."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedModel,
    Trainer,
    set_seed,
)

from hf_compress.cli.arguments import CompressArguments
from hf_compress.cli.data import label_names, load_splits, load_tokenizer, tokenized
from hf_compress.cli.errors import FirstStep, refusing, refusing_until
from hf_compress.cli.methods import pruning_callback
from hf_compress.cli.published import publish_into
from hf_compress.cli.recipe import parse
from hf_compress.distillation.arguments import DistillationArguments
from hf_compress.distillation.layers import init_student
from hf_compress.distillation.trainer import DistillationTrainer
from hf_compress.metrics import functions


def main(argv: list[str]) -> None:
    with refusing():
        arguments, training = parse(argv, CompressArguments, DistillationArguments)
        check_ranks()
        check_folder(training.output_dir)
        if training.resume_from_checkpoint is not None:
            check_checkpoint(training.resume_from_checkpoint)
        trainer, split = build(arguments, training)
    first_step = FirstStep()
    trainer.add_callback(first_step)
    with refusing_until(first_step):
        trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model()
    metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
    trainer.save_state()
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        if trainer.is_world_process_zero():
            print("no card was written: the model is sharded, and only a whole one can be measured.")
        return
    baseline = dense_model(arguments, trainer)
    publish_into(Path(training.output_dir), trainer, arguments, split=split, baseline=baseline)


def dense_model(arguments: CompressArguments, trainer: Trainer) -> PreTrainedModel | None:
    """`model` as it was given; None where `publish` takes the teacher, or it was sparse already."""
    if arguments.teacher is not None or arguments.method == "keep":
        return None
    trained: Any = trainer.model
    classify = arguments.task == "text-classification"
    return load_model(arguments, list(trained.config.id2label.values()) if classify else None)


def build(arguments: CompressArguments, training: DistillationArguments) -> tuple[Trainer, str]:
    """The trainer that these arguments describe, and what the rows are called that it evaluates, with
    everything checked that can be checked now."""
    callback = pruning_callback(arguments, training)
    if callback is None and arguments.teacher is None:
        raise ValueError("nothing to do: pass `sparsity`, `method`, `teacher`, or several of them.")
    if arguments.teacher is None and arguments.teacher_bits is not None:
        raise ValueError("`teacher_bits` is there, but no `teacher`: pass both or neither.")
    set_seed(training.seed)
    with training.main_process_first():
        train, test, split = load_splits(arguments)
        tokenizer = load_tokenizer(arguments)
        classify = arguments.task == "text-classification"
        names = label_names(train, arguments.label_column) if classify else None
        train = tokenized(train, tokenizer, arguments, names)
        test = tokenized(test, tokenizer, arguments, names)
    model = load_model(arguments, names)
    if arguments.student_layers is not None:
        model = init_student(model, arguments.student_layers)
    settings: dict[str, Any] = {
        "model": model,
        "args": training,
        "train_dataset": train,
        "eval_dataset": test,
        "processing_class": tokenizer,
        "callbacks": [] if callback is None else [callback],
    }
    if names is None:
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        settings["data_collator"] = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    else:
        settings["data_collator"] = DataCollatorWithPadding(tokenizer)
        settings["compute_metrics"] = compute_accuracy
    if arguments.teacher is None:
        trainer = Trainer(**settings)
        if callback is not None:
            callback.attach(trainer)
        return trainer, split
    trainer = DistillationTrainer(
        **settings, teacher=arguments.teacher, teacher_bits=arguments.teacher_bits
    )
    return trainer, split


def compute_accuracy(prediction: EvalPrediction) -> dict[str, float]:
    chosen = np.argmax(prediction.predictions, axis=-1)
    return {"accuracy": functions.accuracy(chosen, prediction.label_ids)}


def check_ranks() -> None:
    """Raises ValueError where several processes were launched that did not find each other."""
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched > 1 and PartialState().num_processes == 1:
        raise ValueError(
            f"{launched} processes were launched, but each would train alone. On CPU pass --use_cpu."
        )


def check_folder(folder: str | None) -> None:
    """Raises ValueError where `folder` cannot be written to, before any work is done for it."""
    if folder is None:
        raise ValueError("pass `output_dir`: the folder for the model.")
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".write-test-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"cannot write to output_dir {folder!r}: {error.strerror}.") from None


def check_checkpoint(folder: str) -> None:
    """Raises ValueError where a checkpoint to resume from lacks a file or has a broken one."""
    if not (Path(folder) / "trainer_state.json").is_file():
        raise ValueError(f"no checkpoint to resume from at {folder!r}: it has no trainer_state.json.")
    for file in sorted(Path(folder).rglob("*")):
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, framework="pt"):
                    pass
            elif file.suffix == ".json":
                json.loads(file.read_text(encoding="utf-8"))
            elif file.suffix in (".pt", ".pth", ".bin") and not zipfile.is_zipfile(file):
                raise ValueError("no zip archive, as torch.save writes it")
        except (SafetensorError, ValueError) as error:
            raise ValueError(
                f"{file} is damaged ({error}): resume from an earlier checkpoint, or begin anew."
            ) from None


def load_model(arguments: CompressArguments, names: list[str] | None) -> Any:
    if names is None:
        return AutoModelForCausalLM.from_pretrained(arguments.model)
    return AutoModelForSequenceClassification.from_pretrained(
        arguments.model,
        num_labels=len(names),
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
        # A head made for other classes is made anew, and transformers says so.
        ignore_mismatched_sizes=True,
    )
