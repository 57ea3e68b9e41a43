"""Wrong inputs are told clearly, before the first step."""

import copy

import pytest
import torch
from datasets import Dataset
from tiny import classification_rows, language_rows, tiny_bert, tiny_llama
from transformers import BertForNextSentencePrediction, TrainingArguments

from hf_compress import DistillationArguments, DistillationTrainer

NAN = float("nan")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": 2}, r"`alpha` must be in \[0, 1\], got 2"),
        ({"alpha": -0.1}, r"`alpha` must be in \[0, 1\], got -0.1"),
        ({"alpha": NAN}, r"`alpha` must be in \[0, 1\], got nan"),
        ({"temperature": 0}, "`temperature` must be above 0 and finite, got 0"),
        ({"temperature": -1.0}, "`temperature` must be above 0 and finite, got -1.0"),
        ({"temperature": NAN}, "`temperature` must be above 0 and finite, got nan"),
        ({"temperature": float("inf")}, "`temperature` must be above 0 and finite, got inf"),
        ({"teacher_temperature": 0.0}, "`teacher_temperature` must be above 0 and finite, got 0"),
        ({"divergence": "kl"}, "`divergence` is 'kl'; there are 'forward_kl', 'reverse_kl'"),
        ({"beta": 0.5}, "`beta` is 0.5, but divergence 'forward_kl' has none.*choose 'jsd'"),
        ({"divergence": "jsd", "skew": 0.1}, "`skew` is 0.1, but divergence 'jsd' has none"),
        ({"divergence": "jsd", "beta": 1.5}, r"`beta` must be in \[0, 1\], got 1.5"),
        ({"divergence": "skew_kl", "skew": 1.0}, r"`skew` must be in \[0, 1\), got 1.0"),
        ({"divergence": "skew_reverse_kl", "skew": NAN}, r"`skew` must be in \[0, 1\), got nan"),
    ],
)
def test_arguments(settings, message):
    with pytest.raises(ValueError, match=message):
        DistillationArguments("out", **settings)


def arguments(folder, **settings):
    return DistillationArguments(
        str(folder), use_cpu=True, disable_tqdm=True, save_strategy="no", max_steps=1, **settings
    )


def zero_arguments(folder):
    made = arguments(folder)
    made.deepspeed = {"zero_optimization": {"stage": 3}}  # as it stands after parsing
    return made


def two_gpus(folder):
    made = arguments(folder)
    made._n_gpu = 2
    return made


BERT = tiny_bert()
ROWS = classification_rows(rows=8)

# name: (arguments of the trainer that differ from a right one, error, message)
WRONG = {
    "teacher is the student": ({"model": BERT, "teacher": BERT}, ValueError, "is the student"),
    "teacher with other labels": (
        {"teacher": tiny_bert(num_labels=5)},
        ValueError,
        "has 3 labels, the teacher's 5",
    ),
    "teacher with labels of other names": (
        {
            "model": tiny_bert(id2label={0: "a", 1: "b", 2: "c"}),
            "teacher": tiny_bert(id2label={0: "b", 1: "a", 2: "d"}),
        },
        ValueError,
        "labels with other names",
    ),
    "teacher with two labels of one name": (
        {
            "model": tiny_bert(id2label={0: "a", 1: "a", 2: "c"}),
            "teacher": tiny_bert(id2label={0: "a", 1: "c", 2: "a"}),
        },
        ValueError,
        "labels with other names",
    ),
    "teacher with another head": (
        {"teacher": tiny_llama()},
        ValueError,
        "the teacher's for causal language modelling",
    ),
    "a head that is not supported": (
        {"model": BertForNextSentencePrediction(BERT.config)},
        ValueError,
        "head of BertForNextSentencePrediction. Supported: sequence classification",
    ),
    "teacher of another kind": ({"teacher": 3}, TypeError, "must be a model, a path, a hub id"),
    "no teacher": ({"teacher": None}, TypeError, "must be a model, a path, a hub id"),
    "teacher that is not there": ({"teacher": "./nowhere"}, OSError, "nowhere"),
    "bits that there are not": ({"teacher_bits": 3}, ValueError, "must be 8, 4 or None, got 3"),
    "bits for a module that cannot be saved": (
        {"teacher": torch.nn.Linear(2, 2), "teacher_bits": 8},
        ValueError,
        "needs a transformers model to quantize, got Linear",
    ),
    "a copy of nothing": (
        {"model": None, "model_init": tiny_bert, "teacher": "self"},
        ValueError,
        "pass `model`, not `model_init`",
    ),
    "plain arguments": (
        {"args": lambda folder: TrainingArguments(str(folder), use_cpu=True)},
        TypeError,
        "must have `temperature` and `alpha`, got TrainingArguments",
    ),
    "no arguments": ({"args": lambda folder: None}, TypeError, "got NoneType"),
    "ZeRO": ({"args": zero_arguments}, NotImplementedError, "DeepSpeed is not supported"),
    "DataParallel": ({"args": two_gpus}, NotImplementedError, "2 GPUs in one process"),
    "label smoothing": (
        {"args": lambda folder: arguments(folder, label_smoothing_factor=0.1)},
        ValueError,
        "label_smoothing_factor=0.1 would be ignored",
    ),
    "a loss function of the user": (
        {"compute_loss_func": lambda outputs, labels, num_items_in_batch: 0},
        ValueError,
        "`compute_loss_func` would be ignored",
    ),
    "an empty dataset": (
        {"train_dataset": ROWS.select([])},
        ValueError,
        "train dataset is empty",
    ),
    "an empty evaluation dataset": (
        {"eval_dataset": {"held_out": ROWS.select([])}},
        ValueError,
        "held_out dataset is empty",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_trainer(wrong, tmp_path):
    changes, error, message = WRONG[wrong]
    right = {
        "model": tiny_bert(),
        "args": arguments,
        "teacher": tiny_bert(seed=1),
        "train_dataset": ROWS,
    }
    given = {**right, **changes}
    given["args"] = given["args"](tmp_path)
    with pytest.raises(error, match=message):
        DistillationTrainer(**given)


@pytest.mark.parametrize(
    ("student", "labels", "message"),
    [
        (tiny_bert(), [[0.0, 1.0, 1.0]] * 4, "'cosine' is not defined for multi-label classification"),
        (tiny_bert(num_labels=1), [0.5] * 4, "'cosine' is not defined for regression"),
    ],
)
def test_divergences_that_mean_nothing_for_the_head(student, labels, message, tmp_path):
    rows = Dataset.from_dict({"input_ids": [[5, 6]] * 4, "labels": labels})
    before = copy.deepcopy(student.state_dict())
    trainer = DistillationTrainer(
        student,
        arguments(tmp_path, divergence="cosine"),
        train_dataset=rows,
        teacher=copy.deepcopy(student),
    )
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_another_vocabulary(tmp_path):
    teacher = tiny_llama(seed=1)
    teacher.resize_token_embeddings(112)
    with pytest.raises(ValueError, match="vocabulary has 96 entries, the teacher's 112"):
        DistillationTrainer(tiny_llama(), arguments(tmp_path), teacher=teacher)


@pytest.mark.parametrize(
    ("rows", "student", "message"),
    [
        (ROWS.remove_columns("labels"), tiny_bert(), "has no `labels`, only .'attention_mask'"),
        (
            Dataset.from_dict({"input_ids": [[5, 6]] * 4, "labels": [0.5] * 4}),
            tiny_bert(),
            r"multi-label.*labels of shape \(4, 1\)",
        ),
        (
            language_rows(rows=4).map(lambda row: {"labels": row["labels"][:-1]}),
            tiny_llama(),
            r"labels of shape \(4, 14\)",
        ),
    ],
)
def test_labels_that_do_not_fit_stop_the_first_step(rows, student, message, tmp_path):
    before = copy.deepcopy(student.state_dict())
    teacher = copy.deepcopy(student)
    trainer = DistillationTrainer(student, arguments(tmp_path), train_dataset=rows, teacher=teacher)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
