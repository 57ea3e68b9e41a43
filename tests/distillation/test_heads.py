"""For every kind of head: its loss is the model's own, and only the student is evaluated."""

import numpy as np
import pytest
import torch
from distillation.heads import HEADS, batch_of, make_model, make_rows

from hf_compress import DistillationArguments, DistillationTrainer
from hf_compress.distillation.divergences import Divergence
from hf_compress.distillation.tasks.heads import head_of
from hf_compress.distillation.teacher import accepted_inputs

ROWS = 8
NO_LABELS = ("labels", "start_positions", "end_positions")


def arguments(folder, **settings):
    return DistillationArguments(
        str(folder),
        per_device_train_batch_size=ROWS,
        per_device_eval_batch_size=3,
        max_steps=1,
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        train_sampling_strategy="sequential",
        **settings,
    )


@pytest.mark.parametrize("name", HEADS)
def test_alpha_0_is_the_models_own_loss(name, tmp_path):
    student, rows = make_model(name), make_rows(name, ROWS)
    with torch.no_grad():
        own = student(**batch_of(rows)).loss.item()
    trainer = DistillationTrainer(
        student, arguments(tmp_path, alpha=0.0), train_dataset=rows, teacher=make_model(name, seed=1)
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(own, rel=1e-5)
    assert trainer.state.log_history[0]["loss_kd"] > 1e-3


@pytest.mark.parametrize("name", HEADS)
def test_metrics_see_the_students_predictions_only(name, tmp_path):
    student, teacher, rows = make_model(name), make_model(name, seed=1), make_rows(name, ROWS)
    seen = {}

    def metrics(prediction):
        seen["predictions"], seen["labels"] = prediction.predictions, prediction.label_ids
        return {"seen": 1}

    trainer = DistillationTrainer(
        student,
        arguments(tmp_path, alpha=0.5),
        eval_dataset=rows,
        teacher=teacher,
        compute_metrics=metrics,
    )
    evaluated = trainer.evaluate()
    assert evaluated["eval_seen"] == 1
    batch = batch_of(rows)
    with torch.no_grad():
        own = student.eval()(**batch)
    expected = [own.start_logits, own.end_logits] if "start_positions" in batch else [own.logits]
    # Encoder-decoders also return the encoder's states, as they do in any Trainer.
    given = seen["predictions"] if isinstance(seen["predictions"], tuple) else (seen["predictions"],)
    for ours, theirs in zip(given[: len(expected)], expected, strict=True):
        np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-5)
    labels = seen["labels"] if isinstance(seen["labels"], tuple) else (seen["labels"],)
    expected_labels = [batch[label] for label in NO_LABELS if label in batch]
    for ours, theirs in zip(labels, expected_labels, strict=True):
        np.testing.assert_array_equal(ours, theirs.numpy())
    assert evaluated["eval_loss_task"] == pytest.approx(own.loss.item(), rel=1e-5)


@pytest.mark.parametrize("name", HEADS)
def test_no_model_computes_a_loss_of_its_own_unless_it_must(name):
    student, batch = make_model(name), batch_of(make_rows(name, ROWS))
    features = head_of(student).inputs(student, batch)
    assert not set(features) & set(NO_LABELS) or name == "whisper"
    with torch.no_grad():
        assert (student(**features).loss is None) == (name != "whisper")


@pytest.mark.parametrize("name", ["t5", "bart", "marian", "whisper"])
def test_decoders_see_the_same_inputs_as_in_their_own_training(name):
    student, teacher = make_model(name).eval(), make_model(name, seed=1).eval()
    batch = batch_of(make_rows(name, ROWS))
    features = head_of(student).inputs(student, batch)
    with torch.no_grad():
        for model in (student, teacher):
            ours = model(**accepted_inputs(model, features)).logits
            torch.testing.assert_close(ours, model(**batch).logits)


def test_decoder_inputs_of_a_collator_are_left_alone():
    student, batch = make_model("t5"), batch_of(make_rows("t5", 2))
    given = {**batch, "decoder_input_ids": batch["labels"].clamp(min=0)}
    features = head_of(student).inputs(student, given)
    assert features["decoder_input_ids"] is given["decoder_input_ids"]
    assert "labels" not in features


@pytest.mark.parametrize("name", HEADS)
def test_what_does_not_count_reaches_nothing(name):
    """NaN in the logits of both models wherever a position or a frame is not labelled."""
    student, teacher = make_model(name), make_model(name, seed=1)
    batch = batch_of(make_rows(name, ROWS))
    head = head_of(student)
    task = head.task(student, batch)
    features = head.inputs(student, batch)
    with torch.no_grad():
        outputs = [model(**features) for model in (student, teacher)]
    divergence = Divergence(temperature=2.0)
    clean = task.sums(outputs[0], [outputs[1]], batch, divergence=divergence)
    torch.testing.assert_close(clean.items, task.count(batch))
    leaves = []
    for output in outputs:
        for key in ("logits", "start_logits", "end_logits"):
            if key in output:
                output[key] = spoiled(name, key, output[key], batch, student).requires_grad_()
                leaves.append(output[key])
    dirty = task.sums(outputs[0], [outputs[1]], batch, divergence=divergence)
    torch.testing.assert_close([*dirty], [*clean])
    (dirty.task + dirty.distillation).sum().backward()
    for leaf in leaves[: len(leaves) // 2]:
        assert torch.isfinite(leaf.grad).all()
        # No gradient reaches a whole row of classes that is spoiled.
        assert (leaf.grad[leaf.isnan()] == 0).all()


def spoiled(name, key, logits, batch, model):
    logits = logits.clone()
    if name == "question answering":
        positions = batch[key.replace("logits", "positions")]
        logits[positions >= logits.shape[1]] = float("nan")
    elif name == "ctc":
        # Behind the real frames; the task's own loss does not read them either.
        frames = model._get_feat_extract_output_lengths(batch["attention_mask"].sum(-1))
        logits[torch.arange(logits.shape[1]) >= frames[:, None]] = float("nan")
    elif logits.ndim > batch["labels"].ndim:
        logits[batch["labels"] == -100] = float("nan")
    return logits


# name of the head: settings of a teacher that cannot teach it, what the trainer says
WRONG_TEACHERS = {
    "token classification": ({"num_labels": 4}, "has 3 labels, the teacher's 4"),
    "question answering": ({"vocabulary": 100}, "vocabulary has 96 entries, the teacher's 100"),
    "multiple choice": ({"vocabulary": 100}, "vocabulary has 96 entries, the teacher's 100"),
    "masked lm": ({"vocabulary": 100}, "vocabulary has 96 entries, the teacher's 100"),
    "t5": ({"decoder_start_token_id": 1}, "has 0 as its decoder_start_token_id, the teacher's 1"),
    "bart": ({"vocabulary": 100}, "vocabulary has 96 entries, the teacher's 100"),
    "marian": (
        {"decoder_vocab_size": 80, "share_encoder_decoder_embeddings": False},
        "the teacher's 80",
    ),
    "whisper": ({"vocabulary": 100}, "vocabulary has 96 entries, the teacher's 100"),
    "image classification": ({"num_labels": 4}, "has 3 labels, the teacher's 4"),
    "audio classification": ({"num_labels": 4}, "has 3 labels, the teacher's 4"),
    "ctc": ({"pad_token_id": 3}, "has 0 as its pad_token_id, the teacher's 3"),
}


@pytest.mark.parametrize("name", HEADS)
def test_a_teacher_of_other_answers_is_refused(name, tmp_path):
    settings, message = WRONG_TEACHERS[name]
    with pytest.raises(ValueError, match=message):
        DistillationTrainer(
            make_model(name), arguments(tmp_path), teacher=make_model(name, **{"seed": 1, **settings})
        )


@pytest.mark.parametrize(("name", "other"), list(zip(HEADS, [*list(HEADS)[1:], "t5"], strict=True)))
def test_a_teacher_with_another_head_is_refused(name, other, tmp_path):
    if head_of(make_model(name)) is head_of(make_model(other)):
        other = "ctc"
    with pytest.raises(ValueError, match="The student's head is for .*, the teacher's for"):
        DistillationTrainer(make_model(name), arguments(tmp_path), teacher=make_model(other))
