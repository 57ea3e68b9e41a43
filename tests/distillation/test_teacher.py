import copy

import pytest
import torch
from tiny import tiny_bert, tiny_llama
from transformers import (
    BertForMaskedLM,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
)

from hf_compress.distillation.tasks.heads import HEADS
from hf_compress.distillation.teacher import (
    accepted_inputs,
    check_pair,
    load_teacher,
)
from hf_compress.frozen import snapshot

CLASSIFICATION = HEADS[0]
CPU = torch.device("cpu")


def logits(model, ids=None):
    ids = torch.arange(5, 13)[None] if ids is None else ids
    with torch.no_grad():
        return model(input_ids=ids).logits


def test_a_module_is_frozen_and_put_in_eval_mode():
    model = tiny_bert().train()
    teacher = load_teacher(model, CLASSIFICATION, bits=None, device=CPU)
    assert teacher is model
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_a_path_is_loaded_with_the_class_of_the_head(tmp_path):
    model = tiny_bert().eval()
    model.save_pretrained(tmp_path)
    teacher = load_teacher(str(tmp_path), CLASSIFICATION, bits=None, device=CPU)
    assert type(teacher) is BertForSequenceClassification
    assert not teacher.training
    torch.testing.assert_close(logits(teacher), logits(model))


def test_a_checkpoint_without_a_trained_head_is_refused(tmp_path):
    BertForMaskedLM(tiny_bert().config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="saved as BertForMaskedLM and has no trained head"):
        load_teacher(str(tmp_path), CLASSIFICATION, bits=None, device=CPU)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_module_is_quantized_by_way_of_a_folder_and_stays_as_it_is(bits):
    pytest.importorskip("bitsandbytes")
    model = tiny_bert(hidden=64).eval()
    before = copy.deepcopy(model.state_dict())
    teacher = load_teacher(model, CLASSIFICATION, bits=bits, device=CPU)
    assert teacher is not model
    assert teacher.is_quantized
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    error = (logits(teacher) - logits(model)).abs().max()
    assert 0 < error < 0.05


def test_a_snapshot_does_not_follow_the_student():
    student = tiny_bert()
    teacher = snapshot(student)
    before = logits(teacher)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    torch.testing.assert_close(logits(teacher), before)
    assert student.training or student.classifier.weight.requires_grad


def test_a_snapshot_runs_itself_where_the_forward_of_the_student_was_patched():
    """As trl's SFTTrainer leaves it: a forward on the instance that closes over the original."""
    student = tiny_llama()
    original = student.forward
    student.forward = lambda **inputs: original(**inputs)
    teacher = snapshot(student)
    before = logits(teacher)
    with torch.no_grad():
        student.lm_head.weight.zero_()
    torch.testing.assert_close(logits(teacher), before)
    assert before.abs().max() > 0


def test_a_teacher_gets_the_inputs_that_its_forward_names():
    distilbert = DistilBertForSequenceClassification(
        DistilBertConfig(vocab_size=96, dim=16, n_layers=1, n_heads=2, hidden_dim=16)
    )
    batch = dict.fromkeys(("input_ids", "attention_mask", "token_type_ids"), 0)
    assert set(accepted_inputs(distilbert, batch)) == {"input_ids", "attention_mask"}
    assert accepted_inputs(tiny_bert(), batch) == batch


NAMES = {0: "good", 1: "bad", 2: "ugly"}
SWAPPED = {0: "bad", 1: "good", 2: "ugly"}


def test_pairs_that_fit_are_accepted():
    student = tiny_bert(id2label=NAMES)
    check_pair(student, tiny_bert(seed=1, layers=3, hidden=64, id2label=NAMES))
    check_pair(student, tiny_bert(seed=1, id2label={0: "Good", 1: "BAD", 2: "ugly"}))
    # LABEL_0, LABEL_1, ... say nothing about what they stand for.
    check_pair(student, tiny_bert(seed=1))
    check_pair(tiny_llama(), tiny_llama(seed=1, layers=1))
    assert check_pair(student, tiny_bert(seed=1, id2label=NAMES)) is None
    assert check_pair(student, tiny_bert(seed=1, id2label=SWAPPED)) == [1, 0, 2]


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        (tiny_bert(), tiny_bert(num_labels=4), "has 3 labels, the teacher's 4"),
        (
            tiny_bert(id2label=NAMES),
            tiny_bert(id2label={0: "a", 1: "b", 2: "c"}),
            "labels with other names",
        ),
        (
            tiny_bert(problem_type="multi_label_classification"),
            tiny_bert(problem_type="single_label_classification"),
            "multi_label_classification",
        ),
        (tiny_bert(), tiny_llama(), "sequence classification.*causal language modelling"),
    ],
)
def test_pairs_that_do_not_fit_are_refused(student, teacher, message):
    with pytest.raises(ValueError, match=message):
        check_pair(student, teacher)


@pytest.mark.parametrize("make", [tiny_bert, tiny_llama])
def test_another_vocabulary_is_refused(make):
    student, teacher = make(), make()
    teacher.resize_token_embeddings(100)
    with pytest.raises(ValueError, match="vocabulary has 96 entries, the teacher's 100"):
        check_pair(student, teacher)


def test_weights_shared_with_the_student_are_refused():
    student = tiny_bert()
    with pytest.raises(ValueError, match="teacher is the student, or shares weights"):
        check_pair(student, student)
    teacher = tiny_bert()
    teacher.bert.embeddings = student.bert.embeddings
    with pytest.raises(ValueError, match="shares weights"):
        check_pair(student, teacher)


def test_the_base_of_a_lora_student_is_refused():
    """peft builds the adapters into it: it would answer exactly as the student does."""
    from peft import LoraConfig, get_peft_model

    base = tiny_bert()
    student = get_peft_model(base, LoraConfig(target_modules=["query"], task_type="SEQ_CLS"))
    with pytest.raises(ValueError, match="shares weights"):
        check_pair(student, base)
