"""Several teachers, of which a column of the dataset says for each row who teaches it."""

from collections.abc import Iterable

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from distillation.heads import batch_of, make_model, make_rows
from tiny import classification_rows, language_rows, tiny_bert, tiny_llama

from hf_compress import DistillationArguments, DistillationTrainer
from hf_compress.distillation.routing import ROUTES, RoutedTeacher
from hf_compress.distillation.tasks.heads import head_of
from hf_compress.distillation.teachers import FrozenTeacher

SPREAD = {"initializer_range": 0.3}
SETTINGS = {
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 3,
    "max_steps": 2,
    "logging_steps": 1,
    "learning_rate": 1e-2,
    "save_strategy": "no",
    "use_cpu": True,
    "disable_tqdm": True,
    "report_to": "none",
}
# Neither in turn, nor equally many, and the last batch of 8 rows has one of them only.
SOURCES = ["law", "news", "news", "law", "news", "news", "news", "news"]


def with_sources(rows, sources=SOURCES):
    return rows.add_column("source", [sources[i % len(sources)] for i in range(len(rows))])


def build(folder, student, teacher, rows, *, column="source", trainer=None, **settings):
    return DistillationTrainer(
        student,
        DistillationArguments(str(folder), **{**SETTINGS, **settings}),
        train_dataset=rows,
        teacher=teacher,
        teacher_column=column,
        **(trainer or {}),
    )


def berts():
    return {name: tiny_bert(seed=seed, **SPREAD) for seed, name in enumerate(("law", "news"), 1)}


def losses(trainer):
    trainer.train()
    return [log["loss_kd"] for log in trainer.state.log_history if "loss_kd" in log]


@pytest.mark.parametrize(
    "head", ["question answering", "multiple choice", "ctc", "t5", "image classification"]
)
def test_each_row_gets_the_answer_of_its_teacher(head):
    models = [make_model(head, seed=seed).eval() for seed in (1, 2, 3)]
    student = make_model(head)
    batch = head_of(student).inputs(student, batch_of(make_rows(head, 6)))
    routes = torch.tensor([2, 0, 0, 2, 2, 0])  # the second one has no row
    teachers = [FrozenTeacher(model) for model in models]
    found = RoutedTeacher(teachers)({**batch, ROUTES: routes})
    for name in ("logits", "start_logits", "end_logits"):
        if not hasattr(found, name):
            continue
        whole = [teacher(batch)[name] for teacher in teachers]
        expected = torch.stack([whole[route][row] for row, route in enumerate(routes.tolist())])
        torch.testing.assert_close(getattr(found, name), expected)
        for number in (0, 2):
            own = routes == number
            alone = teachers[number]({key: value[own] for key, value in batch.items()})[name]
            assert torch.equal(getattr(found, name)[own], alone)


def test_the_loss_is_that_of_each_row_and_its_teacher(tmp_path):
    rows, teachers, student = with_sources(classification_rows(rows=8)), berts(), tiny_bert(**SPREAD)
    trainer = build(tmp_path, student, teachers, rows, train_sampling_strategy="sequential")
    student.eval()
    divergences = []
    for row in rows:
        inputs = {name: torch.tensor([row[name]]) for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            ours = F.log_softmax(student(**inputs).logits / 2, dim=-1)
            theirs = F.log_softmax(teachers[row["source"]](**inputs).logits / 2, dim=-1)
        divergences.append(4 * F.kl_div(ours, theirs, log_target=True, reduction="sum").item())
    assert losses(trainer)[0] == pytest.approx(sum(divergences[:4]) / 4, rel=1e-5)


@pytest.mark.parametrize("head", ["question answering", "ctc", "t5", "token classification"])
def test_loss_and_gradient_do_not_depend_on_the_cut(head, tmp_path):
    rows = with_sources(make_rows(head, 8))
    teachers = {name: make_model(head, seed=seed) for seed, name in enumerate(("law", "news"), 1)}
    trainer = build(tmp_path, make_model(head), teachers, rows)
    scaling = trainer.check_scaling()
    assert scaling.agrees, str(scaling)
    assert trainer.teachers == list(teachers.values())
    assert trainer.teacher is None


@pytest.mark.parametrize("accumulation", [1, 2])
def test_rows_of_one_teacher_alone_are_taught_as_ever(accumulation, tmp_path):
    """Through a list, by numbers, in training and evaluation; the other teacher answers nothing."""
    rows = classification_rows(rows=16)
    cut = {
        "gradient_accumulation_steps": accumulation,
        "per_device_train_batch_size": 4 // accumulation,
    }
    found = []
    for several in (True, False):
        teacher = tiny_bert(seed=1, **SPREAD)
        kept = rows.add_column("source", [1] * len(rows)) if several else rows
        trainer = build(
            tmp_path,
            tiny_bert(**SPREAD),
            [tiny_bert(seed=2), teacher] if several else teacher,
            kept,
            column="source" if several else None,
            **cut,
        )
        found.append([*losses(trainer), trainer.evaluate(kept)["eval_loss_kd"]])
    assert found[0] == found[1]


def test_the_student_as_it_is_and_a_path_have_rows_of_their_own(tmp_path):
    tiny_bert(seed=1, **SPREAD).save_pretrained(tmp_path / "law")
    teachers = {"law": str(tmp_path / "law"), "news": "self"}
    student = tiny_bert(id2label={0: "a", 1: "b", 2: "c"}, **SPREAD)
    rows = with_sources(classification_rows(rows=8), ["news"])
    assert losses(build(tmp_path, student, teachers, rows))[0] == pytest.approx(0, abs=1e-6)


def test_labels_are_put_in_order_for_each_teacher(tmp_path):
    names = {0: "good", 1: "bad", 2: "ugly"}
    turned = tiny_bert(seed=1, id2label={0: "Bad", 1: "UGLY", 2: "good"}, **SPREAD)
    plain = tiny_bert(seed=1, id2label=names, **SPREAD)
    turned.classifier.weight.data = plain.classifier.weight.data[[1, 2, 0]]
    turned.classifier.bias.data = plain.classifier.bias.data[[1, 2, 0]]
    found = [
        losses(
            build(
                tmp_path,
                tiny_bert(id2label=names, **SPREAD),
                {"law": first, "news": tiny_bert(seed=2, id2label=names, **SPREAD)},
                with_sources(classification_rows(rows=8)),
            )
        )
        for first in (plain, turned)
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-6)


@pytest.mark.parametrize("on_policy", [0.0, 1.0])
def test_language_models_hold_their_logits_whole_and_say_so(on_policy, tmp_path, caplog):
    teachers = {"law": tiny_llama(seed=1, **SPREAD), "news": tiny_llama(seed=2, **SPREAD)}
    trainer = build(
        tmp_path,
        tiny_llama(**SPREAD),
        teachers,
        with_sources(language_rows(rows=8)),
        chunk_size=4,
        on_policy=on_policy,
    )
    trainer.train()
    name = "on_policy_loss_kd" if on_policy else "loss_kd"
    assert all(log[name] > 0 for log in trainer.state.log_history if "loss" in log)
    assert "each row has a teacher of its own" in caplog.text


class Streamed(torch.utils.data.Dataset):
    """Rows that cannot be looked through before."""

    def __init__(self, rows: Iterable):
        self.rows = list(rows)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def test_a_name_that_no_teacher_has_is_refused(tmp_path):
    rows = with_sources(classification_rows(rows=8), [*SOURCES[:7], "sport"])
    message = r"The column 'source' names 'sport', but the teachers are 'law', 'news'"
    with pytest.raises(ValueError, match=message):
        build(tmp_path, tiny_bert(), berts(), rows)
    trainer = build(tmp_path, tiny_bert(), berts(), Streamed(rows))
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_a_column_that_is_missing_is_refused_with_what_to_do(tmp_path):
    rows = classification_rows(rows=8)
    message = "`teacher_column` is 'source', but a dataset has only the columns .*input_ids.*: add it"
    with pytest.raises(ValueError, match=message):
        build(tmp_path, tiny_bert(), berts(), rows)
    with pytest.raises(ValueError, match=message):
        build(tmp_path, tiny_bert(), berts(), with_sources(rows), trainer={"eval_dataset": rows})
    trainer = build(tmp_path, tiny_bert(), berts(), Streamed(rows))
    with pytest.raises(ValueError, match=r"has no column 'source'.*remove_unused_columns=False"):
        trainer.train()


def test_rows_that_come_packed_are_refused(tmp_path):
    def packed(rows):
        ids = [token for row in rows for token in row["input_ids"]]
        labels = [token for row in rows for token in row["labels"]]
        return {"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels])}

    teachers = {"law": tiny_llama(seed=1), "news": tiny_llama(seed=2)}
    rows = with_sources(language_rows(rows=8))
    trainer = build(tmp_path, tiny_llama(), teachers, rows, trainer={"data_collator": packed})
    with pytest.raises(ValueError, match=r"`input_ids` of shape \(1, .* for 4 rows with teachers of"):
        trainer.train()


@pytest.mark.parametrize(
    ("teacher", "others", "message"),
    [
        (berts(), {"column": None}, "`teacher` is a dict: pass `teacher_column` too.*'law', 'news'"),
        (tiny_bert(seed=1), {}, "there is no choice of teachers: pass"),
        ({}, {}, "there is no choice of teachers"),
        ({"law": "cached", "news": "cached"}, {}, "teacher='cached' must stand alone"),
        (berts(), {"trainer": {"teacher_weights": [1, 2]}}, "neither `teacher_weights`"),
        (berts(), {"trainer": {"teacher_bits": "auto"}}, "nor teacher_bits='auto'"),
        (berts(), {"trainer": {"matches": "pkd"}}, "`matches` need one teacher's layers"),
    ],
)
def test_what_does_not_go_together_is_refused(teacher, others, message, tmp_path):
    rows: Dataset = with_sources(classification_rows(rows=8))
    with pytest.raises(ValueError, match=message):
        build(tmp_path, tiny_bert(), teacher, rows, **others)
