"""Prune, quantize and distil a model on a dataset: `hf-compress compress`, `scripts/compress.py`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, Trainer, set_seed

from hf_compress.cli.adapters import with_adapters
from hf_compress.cli.arguments import CompressArguments
from hf_compress.cli.checks import check_checkpoint, check_folder, check_ranks
from hf_compress.cli.errors import FirstStep, refusing, refusing_until
from hf_compress.cli.methods import check_methods, pruning_callback, quantization_callback
from hf_compress.cli.published import publish_into
from hf_compress.cli.recipe import parse
from hf_compress.cli.tasks import Data, is_untrained, load_data, load_model
from hf_compress.distillation.arguments import DistillationArguments
from hf_compress.distillation.layers import init_student
from hf_compress.distillation.trainer import DistillationTrainer
from hf_compress.samples import NOTES

DENSE = "dense"
"""The folder, in the output directory, of the model that `dense_epochs` made; and a teacher's name."""


def main(argv: list[str]) -> None:
    with refusing():
        arguments, training = parse(argv, CompressArguments, DistillationArguments)
        check_ranks()
        check_folder(training.output_dir)
        if training.resume_from_checkpoint is not None:
            check_checkpoint(training.resume_from_checkpoint)
        trainer, split = build(arguments, training)
    dense_name = NOTES.get(Path(arguments.model).name)
    if arguments.dense_epochs is not None:
        dense_name = f"all its weights, trained on the same rows, epochs: {arguments.dense_epochs:g}"
        arguments = fine_tuned(arguments, training)
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
    publish_into(
        Path(training.output_dir),
        trainer,
        arguments,
        split=split,
        baseline=dense_model(arguments, trainer),
        baseline_name=dense_name,
    )


def fine_tuned(arguments: CompressArguments, training: DistillationArguments) -> CompressArguments:
    """The same for the model that `dense_epochs` make of this one. Where a training is resumed it is
    the one that was made before."""
    folder = Path(str(training.output_dir), DENSE)
    began_with = arguments.base_model or arguments.model
    made = replace(arguments, model=str(folder), base_model=began_with, dense_epochs=None)
    if arguments.teacher == DENSE:
        made.teacher = str(folder)
    if training.resume_from_checkpoint is not None and (folder / "config.json").is_file():
        return made
    set_seed(training.seed)
    with training.main_process_first():
        data = load_data(arguments)
    settings = replace(
        training,
        output_dir=str(folder),
        num_train_epochs=arguments.dense_epochs or 0.0,
        max_steps=-1,
        eval_strategy="no",
        save_strategy="no",
        load_best_model_at_end=False,
        push_to_hub=False,
        report_to="none",
    )
    trainer = Trainer(load_model(arguments, data.names), settings, **_inputs(data))
    trainer.train()
    trainer.save_model()
    return made


def dense_model(arguments: CompressArguments, trainer: Trainer) -> PreTrainedModel | None:
    """`model` as it was given, or as `dense_epochs` made it; None where `publish` takes the teacher, or
    it was sparse already."""
    if arguments.method == "keep":
        return None
    # A teacher in few bits is not the dense model, though it was made of it.
    packed_of_it = arguments.teacher == arguments.model and arguments.teacher_bits is not None
    if arguments.teacher is not None and not packed_of_it:
        return None
    trained: Any = trainer.model
    classify = arguments.task != "causal-lm"
    return load_model(arguments, list(trained.config.id2label.values()) if classify else None)


def build(arguments: CompressArguments, training: DistillationArguments) -> tuple[Trainer, str]:
    """The trainer that these arguments describe, and what the rows are called that it evaluates, with
    everything checked that can be checked now. With `dense_epochs` its model is not yet fine-tuned."""
    check_methods(arguments)
    callbacks: list[Any] = [
        callback
        for callback in (pruning_callback(arguments, training), quantization_callback(arguments))
        if callback is not None
    ]
    if not callbacks and arguments.teacher is None and arguments.load_bits is None:
        raise ValueError(
            "nothing to do: pass `sparsity`, `method`, `bits`, `load_bits`, `teacher`, or several."
        )
    if arguments.dense_epochs is None and is_untrained(arguments.model):
        raise ValueError(f"{arguments.model} has a config and no weights: pass `dense_epochs`.")
    set_seed(training.seed)
    with training.main_process_first():
        data = load_data(arguments)
    if arguments.load_bits is not None:
        model = with_adapters(arguments, data.names)
    else:
        model = load_model(arguments, data.names)
    if arguments.student_layers is not None:
        model = init_student(model, arguments.student_layers)
    if arguments.teacher is None:
        trainer = Trainer(model, training, callbacks=callbacks, **_inputs(data))
        for callback in callbacks:
            callback.attach(trainer)
        return trainer, data.split
    # The dense model of `dense_epochs` is still to be made.
    unmade = arguments.teacher == DENSE
    trainer = DistillationTrainer(
        model,
        training,
        teacher="self" if unmade else arguments.teacher,
        teacher_bits=None if unmade else arguments.teacher_bits,
        callbacks=callbacks,
        **_inputs(data),
    )
    return trainer, data.split


def _inputs(data: Data) -> dict[str, Any]:
    return {
        "train_dataset": data.train,
        "eval_dataset": data.test,
        "processing_class": data.processing,
        "data_collator": data.collator,
        "compute_metrics": data.compute_metrics,
    }
