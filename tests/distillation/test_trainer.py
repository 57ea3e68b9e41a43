import copy
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from comparing import assert_equal, weights
from tiny import classification_rows, language_rows, tiny_bert, tiny_llama
from transformers import AutoModelForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from hf_compress import DistillationArguments, DistillationTrainer, PruningCallback

QUIET = {
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "max_steps": 4,
    "learning_rate": 1e-2,
    "logging_steps": 2,
    "save_strategy": "no",
    "use_cpu": True,
    "disable_tqdm": True,
}


def arguments(folder, **changes):
    return DistillationArguments(str(folder), **{**QUIET, **changes})


def distil(folder, student, teacher, rows=None, *, trainer=None, **changes):
    built = DistillationTrainer(
        student,
        arguments(folder, **changes),
        train_dataset=classification_rows() if rows is None else rows,
        teacher=teacher,
        **(trainer or {}),
    )
    built.train()
    return built


# The loss


def test_alpha_0_trains_bit_for_bit_as_trainer_does(tmp_path):
    """With dropout, shuffling, ragged batches and accumulation, and a teacher loaded on the way."""
    rows, config = language_rows(), {"attention_dropout": 0.1}
    settings = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5}
    teacher = tmp_path / "teacher"
    tiny_llama(seed=1).save_pretrained(teacher)
    plain = Trainer(
        tiny_llama(**config),
        TrainingArguments(str(tmp_path), **{**QUIET, **settings}),
        train_dataset=rows,
    )
    plain.train()
    ours = distil(tmp_path, tiny_llama(**config), str(teacher), rows, alpha=0.0, **settings)
    assert_equal(weights(ours.model), weights(plain.model))
    losses = [
        [log["loss"] for log in trainer.state.log_history if "loss" in log] for trainer in (ours, plain)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_alpha_0_is_plain_cross_entropy_where_trainer_scales_it_by_the_accumulation(tmp_path):
    """BertForSequenceClassification ignores the item count, so plain Trainer is right only uncut."""
    plain = Trainer(
        tiny_bert(),
        TrainingArguments(str(tmp_path), **{**QUIET, "per_device_train_batch_size": 8}),
        train_dataset=classification_rows(),
    )
    plain.train()
    ours = distil(
        tmp_path,
        tiny_bert(),
        tiny_bert(seed=1),
        alpha=0.0,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
    )
    for name, value in weights(plain.model).items():
        torch.testing.assert_close(ours.model.state_dict()[name], value, rtol=1e-3, atol=1e-5)


def test_alpha_1_does_not_read_the_labels(tmp_path):
    rows = classification_rows()
    other = rows.map(lambda row: {"labels": (row["labels"] + 1) % 3})
    runs = [distil(tmp_path, tiny_bert(), tiny_bert(seed=1), data, alpha=1.0) for data in (rows, other)]
    assert_equal(weights(runs[0].model), weights(runs[1].model))


def test_a_part_of_weight_0_cannot_spoil_the_other(tmp_path):
    teacher = tiny_bert(seed=1)
    torch.nn.init.constant_(teacher.classifier.bias, float("nan"))
    trained = distil(tmp_path, tiny_bert(), teacher, alpha=0.0)
    assert all(torch.isfinite(value).all() for value in weights(trained.model).values())


def test_the_student_learns_what_only_the_teacher_knows(tmp_path):
    rows = classification_rows(rows=128)
    settings = {"max_steps": 60, "per_device_train_batch_size": 16, "learning_rate": 3e-3}
    # All labels are the same: what is learned comes from the teacher.
    blank = rows.map(lambda row: {"labels": 0})
    teacher = distil(tmp_path, tiny_bert(), tiny_bert(seed=1), rows, alpha=0.0, **settings).model
    student = distil(
        tmp_path,
        tiny_bert(layers=1, seed=2),
        teacher,
        blank,
        alpha=1.0,
        trainer={"eval_dataset": blank},
        **settings,
    )
    first = student.state.log_history[0]["agreement"]
    assert student.evaluate()["eval_agreement"] > max(0.8, first + 0.1)


def test_mixed_precision_changes_the_loss_by_rounding_only(tmp_path):
    logs = [
        distil(tmp_path, tiny_bert(), tiny_bert(seed=1), bf16=bf16, logging_steps=1).state.log_history[
            0
        ]
        for bf16 in (False, True)
    ]
    assert logs[1]["loss"] == pytest.approx(logs[0]["loss"], rel=0.01)
    assert logs[1]["loss"] != logs[0]["loss"]


# The logs


def test_the_loss_is_the_weighted_sum_of_its_logged_parts(tmp_path):
    reported = []

    class Reporter(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            reported.append(dict(logs))

    trainer = distil(
        tmp_path,
        tiny_bert(),
        tiny_bert(seed=1),
        alpha=0.25,
        trainer={"callbacks": [Reporter()], "eval_dataset": classification_rows(rows=10)},
    )
    evaluated = trainer.evaluate()
    steps = [log for log in trainer.state.log_history if "loss" in log]
    assert len(steps) == 2
    for log in [*steps, {name.removeprefix("eval_"): value for name, value in evaluated.items()}]:
        expected = 0.75 * log["loss_task"] + 0.25 * log["loss_kd"]
        assert log["loss"] == pytest.approx(expected, rel=1e-5)
        assert 0 <= log["agreement"] <= 1
    for log in trainer.state.log_history:
        assert any(log.items() >= seen.items() for seen in reported)


def test_evaluation_is_an_exact_mean_over_the_items_of_the_students_answers(tmp_path):
    """10 ragged rows in batches of 4: neither the loss nor the metrics depend on the batches."""
    student, teacher = tiny_llama(), tiny_llama(seed=1)
    rows = language_rows(rows=10)
    seen = {}

    def metrics(prediction):
        seen["logits"] = prediction.predictions
        return {"shape": 0}

    trainer = DistillationTrainer(
        student,
        arguments(tmp_path, alpha=0.0),
        eval_dataset=rows,
        teacher=teacher,
        compute_metrics=metrics,
    )
    evaluated = trainer.evaluate()
    batch = {name: torch.tensor(rows[name]) for name in rows.column_names}
    with torch.no_grad():
        reference = student.eval()(**batch)
        taught = teacher(batch["input_ids"], batch["attention_mask"]).logits
    assert evaluated["eval_loss"] == pytest.approx(reference.loss.item(), rel=1e-6)
    counts = batch["labels"][:, 1:] != -100
    same = (reference.logits.argmax(-1) == taught.argmax(-1))[:, :-1][counts].float().mean()
    assert evaluated["eval_agreement"] == pytest.approx(same.item())
    np.testing.assert_allclose(seen["logits"], reference.logits.numpy(), atol=1e-5)


def test_several_evaluation_sets_and_predict_keep_their_prefixes(tmp_path):
    rows = classification_rows(rows=8)
    trainer = DistillationTrainer(
        tiny_bert(),
        arguments(tmp_path),
        eval_dataset={"a": rows, "b": rows.select(range(3))},
        teacher=tiny_bert(seed=1),
    )
    assert {"eval_a_loss_kd", "eval_b_loss_kd"} <= trainer.evaluate().keys()
    assert "test_agreement" in trainer.predict(rows).metrics
    unlabelled = trainer.predict(rows.remove_columns("labels"))
    assert unlabelled.predictions.shape == (8, 3)
    assert "test_loss_kd" not in unlabelled.metrics


def test_regression_logs_no_agreement(tmp_path):
    rows = classification_rows().map(lambda row: {"labels": float(row["labels"])})
    trainer = distil(tmp_path, tiny_bert(num_labels=1), tiny_bert(num_labels=1, seed=1), rows)
    log = trainer.state.log_history[0]
    assert "loss_kd" in log
    assert "agreement" not in log


def test_a_second_training_starts_its_log_afresh(tmp_path):
    """Three steps and a log every two: the last step of the first training is in no later log."""
    trainer = distil(tmp_path, tiny_bert(), tiny_bert(seed=1), learning_rate=0.0, max_steps=3)
    logged = []
    for _ in range(2):
        logged.append([log["loss_kd"] for log in trainer.state.log_history if "loss_kd" in log])
        trainer.train()
    assert logged[0] == logged[1]


# The teacher


def test_the_teacher_is_untouched_by_training(tmp_path):
    teacher = tiny_bert(seed=1, classifier_dropout=0.5)
    before = weights(teacher)
    trainer = distil(tmp_path, tiny_bert(), teacher)
    trainer.model.train()
    assert not any(module.training for module in teacher.modules())
    assert_equal(weights(teacher), before)
    assert all(parameter.grad is None for parameter in teacher.parameters())
    optimized = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert not optimized & {id(parameter) for parameter in teacher.parameters()}
    assert teacher not in trainer.accelerator._models
    assert not {id(m) for m in trainer.model.modules()} & {id(m) for m in teacher.modules()}


def files(folder):
    return {str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file()}


def test_a_checkpoint_has_the_files_and_keys_of_a_plain_trainer(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2}
    plain = Trainer(
        tiny_bert(),
        TrainingArguments(str(tmp_path / "plain"), **{**QUIET, **saving}),
        train_dataset=classification_rows(),
    )
    plain.train()
    distil(tmp_path / "ours", tiny_bert(), tiny_bert(seed=1), **saving)
    assert files(tmp_path / "ours") == files(tmp_path / "plain")
    for kind in ("model.safetensors", "optimizer.pt"):
        sizes = {(tmp_path / run / "checkpoint-4" / kind).stat().st_size for run in ("ours", "plain")}
        assert len(sizes) == 1
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours" / "checkpoint-4")
    assert loaded.config.problem_type == "single_label_classification"


def test_resuming_equals_never_having_stopped(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2}
    whole = distil(tmp_path, tiny_bert(), tiny_bert(seed=1), **saving)
    resumed = DistillationTrainer(
        tiny_bert(seed=3),
        arguments(tmp_path, **saving),
        train_dataset=classification_rows(),
        teacher=tiny_bert(seed=1),
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_equal(weights(resumed.model), weights(whole.model))


def test_the_best_model_can_be_chosen_by_agreement(tmp_path):
    trainer = distil(
        tmp_path,
        tiny_bert(),
        tiny_bert(seed=1),
        trainer={"eval_dataset": classification_rows(rows=16)},
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="agreement",
    )
    best = max(log["eval_agreement"] for log in trainer.state.log_history if "eval_agreement" in log)
    assert trainer.evaluate()["eval_agreement"] == pytest.approx(best)


def test_self_teaches_the_dense_model_to_its_pruned_self(tmp_path):
    student = tiny_bert()
    dense = weights(student)
    trainer = distil(
        tmp_path,
        student,
        "self",
        max_steps=20,
        trainer={"callbacks": [PruningCallback(sparsity=0.5, interval=2)]},
    )
    assert_equal(weights(trainer.teacher), dense)
    log = [log for log in trainer.state.log_history if "loss_kd" in log][-1]
    assert log["loss_kd"] > 0
    assert log["sparsity"] == pytest.approx(0.5, abs=0.01)


def test_compression_callbacks_log_before_the_reporters(tmp_path):
    reported = []

    class Reporter(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            reported.append(dict(logs))

    pruning = PruningCallback(sparsity=0.5)
    distil(tmp_path, tiny_bert(), "self", trainer={"callbacks": [Reporter(), pruning]})
    assert "sparsity" in reported[0]


def test_a_teacher_that_is_the_student_in_disguise_is_told(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="hf_compress"):
        distil(tmp_path, tiny_bert(), tiny_bert(seed=1))
        distil(tmp_path, tiny_bert(), "self")
    assert not caplog.records
    with caplog.at_level(logging.WARNING, logger="hf_compress"):
        distil(tmp_path, tiny_bert(), copy.deepcopy(tiny_bert()))
    assert [record.message for record in caplog.records if "exactly the student's" in record.message]
