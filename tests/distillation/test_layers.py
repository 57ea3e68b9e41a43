import pytest
import torch
from tiny import tiny_bert, tiny_llama
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

from hf_compress.distillation.layers import evenly_spaced, student_from_teacher


def test_evenly_spaced_by_hand():
    assert evenly_spaced(6, 3) == [0, 2, 5]
    assert evenly_spaced(12, 6) == [0, 2, 4, 7, 9, 11]
    assert evenly_spaced(4, 1) == [3]
    assert evenly_spaced(5, 5) == [0, 1, 2, 3, 4]


def test_student_holds_the_teachers_layers():
    teacher = tiny_bert(layers=6)
    student = student_from_teacher(teacher, 3)
    assert student.config.num_hidden_layers == 3
    assert teacher.config.num_hidden_layers == 6
    for new, old in enumerate([0, 2, 5]):
        ours, theirs = student.bert.encoder.layer[new], teacher.bert.encoder.layer[old]
        for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert one.equal(other)
            assert one.data_ptr() != other.data_ptr()
    assert student.classifier.weight.equal(teacher.classifier.weight)


def test_all_layers_give_the_same_logits():
    teacher = tiny_llama(layers=3).eval()
    ids = torch.randint(5, 90, (2, 7))
    assert student_from_teacher(teacher, 3).eval()(ids).logits.equal(teacher(ids).logits)


def test_a_smaller_decoder_reloads_and_generates_with_its_cache(tmp_path):
    student = student_from_teacher(tiny_llama(layers=5), 2).eval()
    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.randint(5, 90, (1, 6))
    cached = loaded.generate(ids, max_new_tokens=5, do_sample=False, use_cache=True)
    plain = student.generate(ids, max_new_tokens=5, do_sample=False, use_cache=False)
    assert cached.equal(plain)


@pytest.mark.parametrize("layers", [0, 7, -1, 2.0, True, "3"])
def test_impossible_numbers_are_refused(layers):
    with pytest.raises(ValueError, match="pass 1 to 6"):
        student_from_teacher(tiny_bert(layers=6), layers)


def test_encoder_decoders_are_refused():
    model = T5ForConditionalGeneration(T5Config(num_layers=2, d_model=8, d_ff=8, num_heads=2, d_kv=4))
    with pytest.raises(ValueError, match="stacks of 2 layers"):
        student_from_teacher(model, 1)
