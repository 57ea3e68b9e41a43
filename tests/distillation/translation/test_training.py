import copy

import pytest
import torch
from distillation.translation.pairs import OURS, THEIRS, model, rows, trainer
from tiny import classification_rows, tiny_bert, tiny_t5

from hf_compress import DistillationArguments, DistillationTrainer
from hf_compress.distillation.translation.collator import TRANSLATED

ACROSS = pytest.mark.parametrize("across", ["likelihood", "uld"])


def logs(built):
    built.train()
    return [row for row in built.state.log_history if "loss" in row]


@ACROSS
def test_loss_and_gradient_do_not_depend_on_the_cut(tmp_path, across):
    """Ragged rows, two of them without any label: a batch without items."""
    settings = {"learning_rate": 0.0, "across_tokenizers": across}
    whole = logs(trainer(tmp_path, **settings))
    for size in (1, 2, 4):
        cut = logs(
            trainer(
                tmp_path,
                per_device_train_batch_size=size,
                gradient_accumulation_steps=8 // size,
                **settings,
            )
        )
        for ours, theirs in zip(cut, whole, strict=True):
            for name in ("loss", "loss_task", "loss_kd", "grad_norm"):
                assert ours[name] == pytest.approx(theirs[name], rel=1e-5), name
            assert "agreement" not in ours


@ACROSS
def test_the_scaling_can_be_checked(tmp_path, across):
    assert trainer(tmp_path, across_tokenizers=across).check_scaling().agrees


@ACROSS
def test_evaluation_does_not_depend_on_the_batch_size(tmp_path, across):
    evaluated = [
        trainer(
            tmp_path,
            across_tokenizers=across,
            per_device_eval_batch_size=size,
            trainer={"eval_dataset": rows(9)},
        ).evaluate()
        for size in (2, 9)
    ]
    for name in ("eval_loss", "eval_loss_task", "eval_loss_kd"):
        assert evaluated[0][name] == pytest.approx(evaluated[1][name], rel=1e-5)


@ACROSS
def test_the_student_comes_closer_to_its_teacher(tmp_path, across):
    built = trainer(
        tmp_path, across_tokenizers=across, max_steps=30, alpha=1.0, temperature=1.0, learning_rate=1e-2
    )
    losses = [row["loss_kd"] for row in logs(built)]
    assert losses[-1] < 0.8 * losses[0]


def test_the_teacher_reads_its_own_tokens(tmp_path):
    built = trainer(tmp_path)
    batch = built.data_collator([rows(4)[i] for i in range(4)])
    translated = batch[TRANSLATED]
    for ours, theirs, mask in zip(
        batch["input_ids"], translated["input_ids"], translated["attention_mask"], strict=True
    ):
        mine = OURS.decode(ours, skip_special_tokens=True)
        assert THEIRS.decode(theirs[mask.bool()], skip_special_tokens=True).strip() == mine.strip()
    # The parts whose spans both know are nearly all of it.
    assert (translated["our_spans"][batch["attention_mask"].bool()] >= 0).float().mean() > 0.95


def test_one_tokenizer_given_twice_gives_the_likelihood_of_each_token(tmp_path):
    student = model(OURS)
    built = trainer(tmp_path, student, copy.deepcopy(student), theirs=OURS, learning_rate=0.0)
    assert [row["loss_kd"] for row in logs(built)] == pytest.approx([0, 0], abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": "cached"}, "one teacher of its own"),
        ({"teacher": "base"}, "one teacher of its own"),
        ({"teacher": [model(THEIRS), model(THEIRS, seed=1)]}, "one teacher of its own"),
        ({"matches": "distilbert"}, "goes with neither `matches` nor teacher_bits='auto'"),
        ({"teacher_bits": "auto"}, "goes with neither `matches` nor teacher_bits='auto'"),
        ({"processing_class": None}, "`processing_class` is a NoneType"),
        ({"teacher_processing_class": "path"}, "`teacher_processing_class` is a str"),
        ({"teacher": tiny_t5()}, "the teacher's for sequence-to-sequence"),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, trainer=changes)


def test_a_teacher_that_is_the_student_is_refused(tmp_path):
    student = model(OURS)
    with pytest.raises(ValueError, match="shares weights"):
        trainer(tmp_path, student, student)


@pytest.mark.parametrize("student", [tiny_t5(), tiny_bert()])
def test_other_heads_are_refused(tmp_path, student):
    with pytest.raises(NotImplementedError, match="is for causal language models"):
        trainer(
            tmp_path, student, copy.deepcopy(student), trainer={"train_dataset": classification_rows()}
        )


def test_a_row_too_long_for_the_teacher_is_refused(tmp_path):
    teacher = model(THEIRS)
    teacher.config.max_position_embeddings = 8
    with pytest.raises(ValueError, match="for the teacher, which can read 8. Shorten the rows"):
        trainer(tmp_path, teacher=teacher).train()


def test_text_of_the_student_is_not_translated(tmp_path):
    with pytest.raises(NotImplementedError, match="on_policy=0.5 asks the teacher about text"):
        trainer(tmp_path, on_policy=0.5)


def test_packed_rows_are_refused(tmp_path):
    built = trainer(tmp_path)
    packed = built.data_collator._collate
    built.data_collator._collate = lambda rows: {**packed(rows), "position_ids": torch.zeros(1)}
    with pytest.raises(ValueError, match="packed"):
        built.train()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"across_tokenizers": "wasserstein"}, "pass 'likelihood' or 'uld'"),
        ({"across_tokenizers": "uld", "divergence": "jsd"}, "divergence='jsd' would be ignored"),
    ],
)
def test_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        DistillationArguments("out", **settings)


def test_without_the_tokenizer_of_the_teacher_the_two_are_told_apart(tmp_path):
    with pytest.raises(ValueError, match="no tokenizer to compare"):
        DistillationTrainer(
            model(OURS),
            DistillationArguments(str(tmp_path), use_cpu=True),
            teacher=model(THEIRS),
            train_dataset=rows(),
            processing_class=OURS,
        )
