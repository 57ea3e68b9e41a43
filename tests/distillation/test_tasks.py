from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_bert, tiny_llama, tiny_llama_classifier
from transformers import (
    BartConfig,
    BartForCausalLM,
    BertForNextSentencePrediction,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
)

from hf_compress.distillation.divergences import Divergence
from hf_compress.distillation.tasks.heads import HEADS, head_of
from hf_compress.distillation.tasks.labelled import CAUSAL_LM, MULTI_LABEL, REGRESSION, SINGLE_LABEL


def output(logits):
    return SimpleNamespace(logits=logits)


def sums(task, student, teacher, labels, temperature=2.0, rows=None):
    return task.sums(
        output(student),
        [output(teacher)],
        {"labels": labels},
        divergence=Divergence(temperature=temperature),
        rows=rows,
    )


def test_next_tokens_are_scored_one_position_earlier():
    logits = torch.zeros(1, 4, 5)
    labels = torch.tensor([[0, 1, 2, 3]])
    before = sums(CAUSAL_LM, logits, logits, labels).task
    for position in range(4):
        moved = logits.clone()
        moved[0, position, 4] = 3.0
        changed = sums(CAUSAL_LM, moved, logits, labels).task != before
        assert changed == (position < 3)  # the last position predicts nothing


def test_causal_loss_and_count_equal_those_of_transformers():
    model = tiny_llama()
    ids = torch.randint(5, 90, (3, 8))
    labels = ids.clone()
    labels[0, :5] = labels[2, :] = -100
    with torch.no_grad():
        reference = model(input_ids=ids, labels=labels)
    total = sums(CAUSAL_LM, reference.logits, reference.logits, labels)
    assert total.items == CAUSAL_LM.count({"labels": labels}) == 3 + 7
    assert total.distillation == 0
    assert total.agreement == 10
    torch.testing.assert_close(total.task / total.items, reference.loss)


@pytest.mark.parametrize(
    ("config", "labels", "name"),
    [
        ({"num_labels": 3}, torch.tensor([0, 2, 1]), "single-label classification"),
        ({"num_labels": 3}, torch.eye(3), "multi-label classification"),
        ({"num_labels": 1}, torch.tensor([0.5, -100.0, 2.0]), "regression"),
        (
            {"num_labels": 3, "problem_type": "regression"},
            torch.tensor([[0.5, 1.0, 2.0]] * 3),
            "regression",
        ),
    ],
)
@pytest.mark.parametrize("make", [tiny_bert, tiny_llama_classifier])
def test_classification_loss_and_problem_type_equal_those_of_transformers(make, config, labels, name):
    ours, theirs = make(**config), make(**config)
    ids = torch.randint(5, 90, (3, 8))
    with torch.no_grad():
        reference = theirs(input_ids=ids, labels=labels)
    task = head_of(ours).task(ours, {"labels": labels})
    assert task.name == name
    assert ours.config.problem_type == theirs.config.problem_type
    total = sums(task, reference.logits, reference.logits, labels)
    assert total.items == task.count({"labels": labels}) == labels.numel()
    torch.testing.assert_close(total.task / total.items, reference.loss)


def test_multi_label_distils_every_label_on_its_own():
    student, teacher = torch.randn(4, 3), torch.randn(4, 3)
    total = sums(MULTI_LABEL, student, teacher, torch.ones(4, 3), temperature=1.0)
    entropy = F.binary_cross_entropy_with_logits(teacher, teacher.sigmoid(), reduction="sum")
    cross = F.binary_cross_entropy_with_logits(student, teacher.sigmoid(), reduction="sum")
    torch.testing.assert_close(total.distillation, cross - entropy)
    assert total.agreement == ((student > 0) == (teacher > 0)).sum()


def test_regression_distils_by_squared_error_and_knows_no_agreement():
    student, teacher = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [2.5]])
    total = sums(REGRESSION, student, teacher, torch.tensor([1.0, 0.0]))
    assert total == (2, 4.0, 4.25, 0)
    assert not REGRESSION.agreement


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("task", "labels", "poisoned"),
    [
        (CAUSAL_LM, torch.tensor([[1, 2, -100, 3], [-100, -100, 2, 1]]), [(0, 1), (0, 3), (1, 0)]),
        (SINGLE_LABEL, torch.tensor([1, -100]), [(1,)]),
        (MULTI_LABEL, torch.tensor([[1.0, 0.0], [-100.0, 1.0]]), [(1, 0)]),
    ],
)
def test_what_stands_at_positions_that_do_not_count_reaches_nothing(task, labels, poisoned, poison):
    shape = labels.shape if task is MULTI_LABEL else (*labels.shape, 5)
    student, teacher = torch.randn(shape), torch.randn(shape)
    clean = sums(task, student, teacher, labels)
    for position in poisoned:
        student[position] = teacher[position] = poison
    student.requires_grad_()
    dirty = sums(task, student, teacher, labels)
    torch.testing.assert_close(dirty, clean)
    (dirty.task + dirty.distillation).backward()
    assert torch.isfinite(student.grad).all()
    for position in poisoned:
        assert (student.grad[position] == 0).all()


@pytest.mark.parametrize("task", [CAUSAL_LM, SINGLE_LABEL])
def test_without_items_the_sums_are_zero_and_in_the_graph(task):
    labels = torch.full((2, 3) if task is CAUSAL_LM else (2,), -100)
    student = torch.randn(*labels.shape, 5, requires_grad=True)
    total = sums(task, student, torch.randn(*labels.shape, 5), labels)
    assert total == (0, 0, 0, 0)
    (total.task + total.distillation).backward()
    assert (student.grad == 0).all()


def test_only_the_first_rows_count_where_asked():
    student, teacher, labels = torch.randn(5, 3), torch.randn(5, 3), torch.arange(5) % 3
    first = sums(SINGLE_LABEL, student[:2], teacher[:2], labels[:2])
    torch.testing.assert_close(sums(SINGLE_LABEL, student, teacher, labels, rows=2), first)
    assert sums(SINGLE_LABEL, student, teacher, labels, rows=0).items == 0


def test_outputs_that_do_not_fit_the_labels_are_refused():
    labels = torch.ones(2, 6, dtype=torch.long)
    with pytest.raises(ValueError, match=r"student answers with logits of shape \(2, 7, 5\)"):
        sums(CAUSAL_LM, torch.randn(2, 8, 5), torch.randn(2, 6, 5), labels)


def test_heads_are_found_in_subclasses_and_under_adapters():
    from peft import LoraConfig, get_peft_model

    class Mine(GPT2LMHeadModel):
        pass

    model = Mine(GPT2Config(vocab_size=30, n_embd=16, n_layer=1, n_head=2))
    assert head_of(model).name == "causal language modelling"
    lora = get_peft_model(tiny_bert(), LoraConfig(target_modules=["query"], task_type="SEQ_CLS"))
    assert head_of(lora).name == "sequence classification"


def test_other_heads_are_refused_with_the_list_of_what_is_supported():
    config = tiny_bert().config
    bart = BartConfig(vocab_size=30, d_model=16, decoder_layers=1, decoder_attention_heads=2)
    for model in (
        BertForNextSentencePrediction(config),
        BertModel(config),
        BartForCausalLM(bart),  # its own loss does not shift the labels
        torch.nn.Linear(2, 2),
    ):
        with pytest.raises(
            ValueError, match=rf"{type(model).__name__}.*sequence classification.*causal"
        ):
            head_of(model)


def test_a_class_has_one_head_only():
    """Where transformers lists a class twice, the order of the rows or `fits` decides."""
    shared = {
        (one.name, other.name): one.class_names & other.class_names
        for number, one in enumerate(HEADS)
        for other in HEADS[number + 1 :]
        if one.class_names & other.class_names
    }
    assert all(names[0].startswith(("sequence-to-sequence", "causal")) for names in shared), shared
