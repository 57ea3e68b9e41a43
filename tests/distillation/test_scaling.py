"""The check that users run on their own model: right, harmless, and able to fail."""

import random

import numpy as np
import pytest
import torch
from datasets import Dataset
from distillation.heads import HEADS, make_model, make_rows
from tiny import classification_rows, tiny_bert
from transformers import default_data_collator

from hf_compress import DistillationArguments, DistillationTrainer


def trainer_of(folder, student, teacher, rows, **others):
    settings = {"use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "max_steps": 2}
    return DistillationTrainer(
        student,
        DistillationArguments(str(folder), per_device_train_batch_size=4, **settings),
        train_dataset=rows,
        teacher=teacher,
        **others,
    )


@pytest.mark.parametrize("name", HEADS)
def test_every_head_agrees(name, tmp_path, capsys):
    trainer = trainer_of(tmp_path, make_model(name), make_model(name, seed=1), make_rows(name, 10))
    scaling = trainer.check_scaling()
    assert scaling.agrees, scaling
    assert [(cut.batch_size, cut.accumulation) for cut in scaling.cuts] == [
        *((8, 1), (4, 2), (2, 4), (1, 8)),
    ]
    assert scaling.cuts[0].gradient_norm > 1e-3
    assert str(scaling) in capsys.readouterr().out


def test_the_numbers_are_those_of_a_training_step(tmp_path):
    rows = make_rows("question answering", 8)
    student, teacher = (make_model("question answering", seed=seed) for seed in (0, 1))
    trainer = trainer_of(tmp_path, student, teacher, rows)
    cut = trainer.check_scaling(rows=4).cuts[0]
    trainer.args.train_sampling_strategy = "sequential"
    trainer.args.logging_steps = trainer.args.max_steps = 1
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(cut.loss, rel=1e-5)
    assert log["grad_norm"] == pytest.approx(cut.gradient_norm, rel=1e-5)


def test_nothing_is_changed(tmp_path):
    rows = classification_rows(rows=12)
    student = tiny_bert(classifier_dropout=0.5)
    trainer = trainer_of(tmp_path, student, tiny_bert(seed=1), rows)
    trainer.train()
    state = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    moments = [value.clone() for entry in trainer.optimizer.state.values() for value in entry.values()]
    gradient = torch.ones_like(student.classifier.weight)
    student.classifier.weight.grad = gradient
    student.train()
    student.bert.encoder.eval()
    randomness = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    trainer.check_scaling()
    assert torch.equal(torch.get_rng_state(), randomness[0])
    assert random.getstate() == randomness[1]
    assert np.random.get_state()[1].tolist() == randomness[2]
    assert student.classifier.weight.grad is gradient
    assert student.training
    assert student.classifier.training
    assert not student.bert.encoder.training
    assert all(torch.equal(value, state[name]) for name, value in trainer.model.state_dict().items())
    after = [value for entry in trainer.optimizer.state.values() for value in entry.values()]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(after, moments, strict=True))
    assert trainer.records.train.values.sum() == 0  # nothing of it is logged


def test_rows_that_depend_on_their_padding_are_found(tmp_path):
    """A collator that pads to the longest row and leaves out the attention mask."""
    rows = make_rows("masked lm", 8).to_list()
    for number, row in enumerate(rows):
        for column in row:
            row[column] = row[column][: 5 + number]

    def pad(examples):
        longest = max(len(example["input_ids"]) for example in examples)
        fill = {"input_ids": 0, "labels": -100}
        return {
            name: torch.tensor([e[name] + [value] * (longest - len(e[name])) for e in examples])
            for name, value in fill.items()
        }

    student, teacher = make_model("masked lm"), make_model("masked lm", seed=1)
    trainer = trainer_of(tmp_path, student, teacher, Dataset.from_list(rows), data_collator=pad)
    scaling = trainer.check_scaling()
    assert not scaling.agrees
    assert "DISAGREE" in str(scaling)


def test_padding_to_the_longest_row_agrees_where_it_is_masked(tmp_path):
    rows = make_rows("masked lm", 8).to_list()

    def pad(examples):
        longest = max(sum(example["attention_mask"]) for example in examples)
        return {name: values[:, :longest] for name, values in default_data_collator(examples).items()}

    student, teacher = make_model("masked lm"), make_model("masked lm", seed=1)
    trainer = trainer_of(tmp_path, student, teacher, Dataset.from_list(rows), data_collator=pad)
    assert trainer.check_scaling().agrees


def test_a_collator_that_draws_is_asked_once(tmp_path):
    """As that of masked language models, which hides other tokens each time."""

    def hide(examples):
        batch = default_data_collator(examples)
        hidden = torch.rand(batch["input_ids"].shape) < 0.3
        batch["labels"] = batch["input_ids"].masked_fill(~hidden, -100)
        batch["input_ids"] = batch["input_ids"].masked_fill(hidden, 4)
        return batch

    student, teacher = make_model("masked lm"), make_model("masked lm", seed=1)
    trainer = trainer_of(tmp_path, student, teacher, make_rows("masked lm", 8), data_collator=hide)
    assert trainer.check_scaling().agrees


def test_streamed_rows(tmp_path):
    rows = classification_rows(rows=12).to_iterable_dataset()
    trainer = trainer_of(tmp_path, tiny_bert(), tiny_bert(seed=1), rows)
    assert trainer.check_scaling(rows=6).agrees


def test_without_rows_there_is_nothing_to_cut(tmp_path):
    trainer = trainer_of(tmp_path, tiny_bert(), tiny_bert(seed=1), classification_rows(rows=12))
    with pytest.raises(ValueError, match="There are 1 rows to cut"):
        trainer.check_scaling(rows=1)
    trainer.train_dataset = None
    with pytest.raises(ValueError, match="There are 0 rows to cut"):
        trainer.check_scaling()
    trainer.train_dataset = classification_rows(rows=4).map(lambda row: {"labels": -100})
    with pytest.raises(ValueError, match="no label that counts"):
        trainer.check_scaling()
