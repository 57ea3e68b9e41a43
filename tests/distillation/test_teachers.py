"""Several teachers, the base under adapters, and teachers that number classes or tokens otherwise."""

import copy

import pytest
import torch
from distillation.heads import make_model, make_rows
from tiny import VOCABULARY, classification_rows, language_rows, tiny_bert, tiny_llama
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from hf_compress import DistillationArguments, DistillationTrainer
from hf_compress.distillation.divergences import DIVERGENCES, Divergence
from hf_compress.distillation.teachers import BaseTeacher

QUIET = {
    "per_device_train_batch_size": 4,
    "max_steps": 3,
    "logging_steps": 1,
    "learning_rate": 1e-2,
    "save_strategy": "no",
    "use_cpu": True,
    "disable_tqdm": True,
}
SPREAD = {"initializer_range": 0.3}


def trainer_of(folder, student, teacher, rows=None, *, settings=None, **others):
    return DistillationTrainer(
        student,
        DistillationArguments(str(folder), **{**QUIET, **(settings or {})}),
        train_dataset=classification_rows(rows=16) if rows is None else rows,
        teacher=teacher,
        **others,
    )


def losses(trainer):
    trainer.train()
    return [log["loss_kd"] for log in trainer.state.log_history if "loss_kd" in log]


# Several


@pytest.mark.parametrize("name", [name for name in DIVERGENCES if not DIVERGENCES[name].of_logits])
def test_the_mean_of_the_distributions_teaches(name):
    teachers = [torch.tensor([[0.2, 0.8]]), torch.tensor([[0.6, 0.4]])]
    mean = 0.25 * teachers[0] + 0.75 * teachers[1]
    divergence = Divergence(name=name, temperature=2.0, teacher_temperature=3.0)
    # Logits that are these probabilities at the teacher's temperature.
    merged = divergence.merged_classes([3 * teacher.log() for teacher in teachers], (0.25, 0.75))
    torch.testing.assert_close((merged / 3).softmax(-1), mean)
    yes = [3 * teacher[:, 1].logit() for teacher in teachers]
    torch.testing.assert_close((divergence.merged_labels(yes, (0.25, 0.75)) / 3).sigmoid(), mean[:, 1])


@pytest.mark.parametrize("name", ["logit_mse", "cosine"])
def test_the_mean_of_the_logits_teaches_where_these_are_compared(name):
    logits = [torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, -2.0]])]
    divergence = Divergence(name=name)
    for merge in (divergence.merged_classes, divergence.merged_labels, divergence.merged_numbers):
        assert merge(logits, (0.25, 0.75)).tolist() == [[2.5, -1.0]]


def test_the_forward_kl_of_a_mean_has_the_mean_gradient():
    generator = torch.Generator().manual_seed(0)
    student, *teachers = (torch.randn(5, 4, generator=generator) for _ in range(3))
    student.requires_grad_()
    divergence, weights = Divergence(temperature=2.0), (0.3, 0.7)
    merged = divergence.merged_classes(teachers, weights)
    alone = sum(
        weight * divergence.between_classes(student, teacher).sum()
        for weight, teacher in zip(weights, teachers, strict=True)
    )
    together = divergence.between_classes(student, merged).sum()
    gradients = [torch.autograd.grad(value, student)[0] for value in (together, alone)]
    torch.testing.assert_close(*gradients)


def test_the_same_teacher_twice_is_that_teacher(tmp_path):
    one = losses(trainer_of(tmp_path, tiny_bert(**SPREAD), tiny_bert(seed=1, **SPREAD)))
    twins = [tiny_bert(seed=1, **SPREAD) for _ in range(2)]
    two = losses(trainer_of(tmp_path, tiny_bert(**SPREAD), twins, teacher_weights=[3, 1]))
    assert two == pytest.approx(one, rel=1e-5)


@pytest.mark.parametrize("head", ["question answering", "ctc", "t5"])
def test_several_teachers_of_other_heads_agree_however_a_batch_is_cut(head, tmp_path):
    teachers = [make_model(head, seed=seed) for seed in (1, 2)]
    trainer = trainer_of(
        tmp_path, make_model(head), teachers, make_rows(head, 8), teacher_weights=(1, 3)
    )
    assert trainer.check_scaling().agrees
    assert trainer.teacher is None
    assert trainer.teachers == teachers


def test_a_path_a_model_and_the_student_as_it_is_teach_together(tmp_path):
    tiny_bert(seed=1).save_pretrained(tmp_path / "teacher")
    student = tiny_bert()
    teachers = [str(tmp_path / "teacher"), tiny_bert(seed=2), "self"]
    trainer = trainer_of(tmp_path, student, teachers)
    trainer.train()
    assert len(trainer.teachers) == 3
    assert not any(p.requires_grad for teacher in trainer.teachers for p in teacher.parameters())


@pytest.mark.parametrize(
    ("teacher", "others", "message"),
    [
        ([], {}, "`teacher` is empty"),
        (
            [tiny_bert(seed=1), tiny_bert(seed=2)],
            {"teacher_weights": [1.0]},
            r"`teacher_weights` is \[1.0\]: pass one number above 0 for each of the 2",
        ),
        ([tiny_bert(seed=1)], {"teacher_weights": [0.0]}, "one number above 0"),
        ([tiny_bert(seed=1), tiny_bert(num_labels=4)], {}, "has 3 labels, the teacher's 4"),
        ([tiny_bert(seed=1), tiny_bert(seed=2)], {"matches": "tinybert"}, "`matches` need one teacher"),
        ("base", {}, "BertForSequenceClassification has none. Pass teacher='self'"),
    ],
)
def test_wrong_teachers_are_refused(teacher, others, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, tiny_bert(), teacher, **others)


# The base


def adapted(base, **settings):
    peft = pytest.importorskip("peft")
    defaults = {"r": 2, "target_modules": ["query"], "init_lora_weights": False, "lora_dropout": 0.5}
    return peft.get_peft_model(base, peft.LoraConfig(**{**defaults, **settings}))


def test_the_base_teaches_as_a_copy_of_it_does(tmp_path):
    """With dropout in the adapters, and a classifier that the student trains as a whole."""
    runs = []
    for teacher in (tiny_bert(**SPREAD), "base"):
        torch.manual_seed(0)
        student = adapted(tiny_bert(**SPREAD), task_type="SEQ_CLS")
        trainer = trainer_of(tmp_path, student, teacher)
        runs.append((losses(trainer), {k: v.clone() for k, v in student.state_dict().items()}))
    assert runs[0][0] == runs[1][0]
    assert runs[0][0][0] > 0
    assert all(torch.equal(runs[1][1][name], value) for name, value in runs[0][1].items())
    assert trainer.teacher is None
    assert trainer.teachers == [student.get_base_model()]


def test_nothing_of_the_student_is_different_after_the_base_has_answered():
    student = adapted(tiny_bert(**SPREAD), task_type="SEQ_CLS")
    student.train()
    frozen = next(p for n, p in student.named_parameters() if "lora_A" in n)
    frozen.requires_grad_(False)
    trains = [p.requires_grad for p in student.parameters()]
    batch = {"input_ids": torch.arange(5, 13)[None], "attention_mask": torch.ones(1, 8).long()}
    before = copy.deepcopy(student).eval()(**batch).logits
    teacher = BaseTeacher(student)
    torch.testing.assert_close(teacher(batch).logits, tiny_bert(**SPREAD).eval()(**batch).logits)
    with pytest.raises(IndexError):
        teacher({**batch, "input_ids": batch["input_ids"] + VOCABULARY})
    assert [p.requires_grad for p in student.parameters()] == trains
    assert all(module.training for module in student.modules())
    torch.testing.assert_close(student.eval()(**batch).logits, before)
    assert not torch.allclose(before, teacher(batch).logits)


def test_the_base_of_a_language_model_learns_nothing_itself(tmp_path):
    base = tiny_llama(**SPREAD)
    before = copy.deepcopy(base.state_dict())
    student = adapted(base, target_modules=["q_proj"], task_type="CAUSAL_LM")
    settings = {"alpha": 1.0, "max_steps": 12}
    trainer = trainer_of(tmp_path, student, "base", language_rows(rows=4), settings=settings)
    assert trainer.check_scaling().agrees
    values = losses(trainer)
    assert values[-1] < values[0]
    after = student.unload().state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_the_base_teaches_beside_activation_checkpointing(tmp_path):
    """Whose second forward, in the backward, runs with the adapters on."""
    runs = []
    for checkpointing in (False, True):
        student = adapted(
            tiny_llama(**SPREAD), target_modules=["q_proj"], task_type="CAUSAL_LM", lora_dropout=0.0
        )
        for number, (_, parameter) in enumerate(sorted(student.named_parameters())):
            if parameter.requires_grad:
                torch.nn.init.normal_(
                    parameter, std=0.1, generator=torch.Generator().manual_seed(number)
                )
        settings = {"activation_checkpointing": checkpointing}
        trainer = trainer_of(tmp_path, student, "base", language_rows(rows=8), settings=settings)
        trainer.train()
        runs.append([log["grad_norm"] for log in trainer.state.log_history if "grad_norm" in log])
    assert runs[0] == pytest.approx(runs[1], rel=1e-5)


def test_the_base_is_as_precise_as_it_is(tmp_path):
    with pytest.raises(ValueError, match=r"leave out `teacher_bits` \(8\)"):
        trainer_of(tmp_path, adapted(tiny_bert()), "base", teacher_bits=8)


# Other numbers for the same


NAMES = {0: "good", 1: "bad", 2: "ugly"}
TURNED = {0: "Bad", 1: "UGLY", 2: "good"}


@pytest.mark.parametrize("problem", ["single_label_classification", "multi_label_classification"])
def test_labels_in_another_order_are_found_by_name(problem, tmp_path):
    rows = classification_rows(rows=16)
    if problem.startswith("multi"):
        hot = torch.eye(3)
        rows = rows.map(lambda row: {"labels": hot[row["labels"]].tolist()})
    teacher = tiny_bert(seed=1, id2label=NAMES, problem_type=problem, **SPREAD)
    turned = tiny_bert(seed=1, id2label=TURNED, problem_type=problem, **SPREAD)
    turned.classifier.weight.data = teacher.classifier.weight.data[[1, 2, 0]]
    turned.classifier.bias.data = teacher.classifier.bias.data[[1, 2, 0]]
    runs = [
        losses(trainer_of(tmp_path, tiny_bert(id2label=NAMES, problem_type=problem), each, rows))
        for each in (teacher, turned)
    ]
    assert runs[0] == pytest.approx(runs[1], rel=1e-6)


def test_tags_in_another_order_are_found_by_name(tmp_path):
    names, turned = {0: "O", 1: "B-PER", 2: "I-PER"}, {0: "B-PER", 1: "I-PER", 2: "O"}
    head, rows = "token classification", make_rows("token classification", 8)
    teacher = make_model(head, seed=1, id2label=names)
    other = make_model(head, seed=1, id2label=turned)
    other.classifier.weight.data = teacher.classifier.weight.data[[1, 2, 0]]
    other.classifier.bias.data = teacher.classifier.bias.data[[1, 2, 0]]
    runs = [
        losses(trainer_of(tmp_path, make_model(head, id2label=names), each, rows))
        for each in (teacher, other)
    ]
    assert runs[0] == pytest.approx(runs[1], rel=1e-6)


def tokenizer(size, changed=()):
    words = {f"w{index}": index for index in range(size)}
    for index in changed:
        words[f"other{index}"] = words.pop(f"w{index}")
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w1")),
        unk_token="w1",
        pad_token="w2",
    )


def saved(folder, model, its_tokenizer):
    model.save_pretrained(folder)
    if its_tokenizer is not None:
        its_tokenizer.save_pretrained(folder)
    return str(folder)


def padded(model, size, noise=0):
    """With more tokens than the tokenizer has; `noise` moves what the model says of these only."""
    model.resize_token_embeddings(size)
    with torch.no_grad():
        model.lm_head.weight[VOCABULARY:] += noise
    return model


@pytest.mark.parametrize("sizes", [(VOCABULARY, 112), (112, VOCABULARY), (104, 112)])
def test_padding_of_the_vocabulary_is_left_out(sizes, tmp_path):
    """Whatever is in it: the models agree with ones without any padding."""
    rows, names = language_rows(rows=8), [f"w{index}" for index in range(VOCABULARY)]
    ours = tokenizer(len(names))
    values = []
    for kind, (student_size, teacher_size) in {
        "plain": (VOCABULARY, VOCABULARY),
        "padded": sizes,
    }.items():
        student = padded(tiny_llama(tie_word_embeddings=False, **SPREAD), student_size, noise=0.5)
        teacher = padded(
            tiny_llama(seed=1, tie_word_embeddings=False, **SPREAD), teacher_size, noise=3.0
        )
        path = saved(tmp_path / f"{kind}", teacher, ours)
        trainer = trainer_of(tmp_path, student, path, rows, processing_class=ours)
        trainer.train()
        values.append(trainer.state.log_history[0])
    assert values[1]["loss_kd"] == pytest.approx(values[0]["loss_kd"], rel=1e-5)
    assert values[1]["agreement"] == values[0]["agreement"]
    # The task's own loss stays that of the student, padding included.
    assert (values[1]["loss_task"] > values[0]["loss_task"] + 1e-6) == (sizes[0] > VOCABULARY)


def test_teachers_of_differently_padded_vocabularies(tmp_path):
    ours = tokenizer(VOCABULARY)
    teachers = [
        saved(tmp_path / str(size), padded(tiny_llama(seed=size), size), ours)
        for size in (VOCABULARY, 112)
    ]
    trainer = trainer_of(tmp_path, tiny_llama(), teachers, language_rows(rows=8), processing_class=ours)
    assert trainer.check_scaling().agrees


def test_a_model_that_only_reads_may_be_padded_too(tmp_path):
    ours = tokenizer(VOCABULARY)
    teacher = tiny_bert(seed=1)
    teacher.resize_token_embeddings(112)
    path = saved(tmp_path / "teacher", teacher, ours)
    trainer = trainer_of(tmp_path, tiny_bert(), path, processing_class=ours)
    trainer.train()
    assert trainer.state.log_history[0]["loss_kd"] > 0


@pytest.mark.parametrize(
    ("size", "ours", "theirs", "message"),
    [
        (112, None, tokenizer(96), "without the student's `processing_class`"),
        (112, tokenizer(96), None, "without the teacher's path"),
        (112, tokenizer(96), tokenizer(96, changed=[7]), "token 7 is 'w7' for the student, 'other7'"),
        (96, tokenizer(96), tokenizer(96, changed=[0]), "token 0 is 'w0' for the student, 'other0'"),
        (
            80,
            tokenizer(96),
            tokenizer(80),
            "tokenizer has 96 tokens, of which the teacher knows only 80",
        ),
    ],
)
def test_vocabularies_that_are_not_known_to_be_the_same_are_refused(
    size, ours, theirs, message, tmp_path
):
    path = saved(tmp_path / "teacher", padded(tiny_llama(seed=1), size), theirs)
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, tiny_llama(), path, language_rows(rows=4), processing_class=ours)


def test_the_same_size_without_tokenizers_is_taken_as_the_same(tmp_path):
    path = saved(tmp_path / "teacher", tiny_llama(seed=1), None)
    trainer_of(tmp_path, tiny_llama(), path, language_rows(rows=4), processing_class=tokenizer(96))
