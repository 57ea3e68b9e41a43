import copy

import pytest
import torch
from distillation.heads import wav2vec2
from tiny import (
    random_images,
    random_sound,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_mixtral,
    tiny_t5,
    tiny_vit,
    tiny_whisper,
)
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    Wav2Vec2ForSequenceClassification,
)

from hf_compress.distillation.layers import evenly_spaced, init_student
from hf_compress.distillation.stacks import find_stacks

IDS = torch.randint(5, 90, (2, 7), generator=torch.Generator().manual_seed(0))


def tiny_bart(layers=2):
    torch.manual_seed(0)
    return BartForConditionalGeneration(
        BartConfig(
            vocab_size=96,
            d_model=16,
            encoder_layers=layers,
            decoder_layers=layers,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=16,
            decoder_ffn_dim=16,
        )
    )


def tiny_distilbert(layers=2):
    torch.manual_seed(0)
    config = DistilBertConfig(vocab_size=96, dim=16, n_heads=2, n_layers=layers, hidden_dim=16)
    return DistilBertForSequenceClassification(config)


def tiny_modernbert(layers=2):
    """Its layers attend in two ways, by turns, and the first lacks a norm."""
    torch.manual_seed(0)
    return ModernBertForSequenceClassification(
        ModernBertConfig(
            vocab_size=96,
            hidden_size=16,
            num_hidden_layers=layers,
            num_attention_heads=2,
            intermediate_size=16,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=2,
            cls_token_id=2,
            sep_token_id=1,
        )
    )


# name: (how to make it, a batch)
MODELS = {
    "bert": (tiny_bert, {"input_ids": IDS}),
    "distilbert": (tiny_distilbert, {"input_ids": IDS}),
    "modernbert": (tiny_modernbert, {"input_ids": IDS}),
    "gpt2": (tiny_gpt2, {"input_ids": IDS}),
    "llama": (tiny_llama, {"input_ids": IDS}),
    "mixtral": (tiny_mixtral, {"input_ids": IDS}),
    "vit": (tiny_vit, {"pixel_values": random_images(2)}),
    "t5": (tiny_t5, {"input_ids": IDS, "labels": IDS}),
    "bart": (tiny_bart, {"input_ids": IDS, "labels": IDS}),
    "whisper": (tiny_whisper, {"input_features": random_sound(2), "labels": IDS}),
}


def test_evenly_spaced_by_hand():
    assert evenly_spaced(6, 3) == [0, 2, 5]
    assert evenly_spaced(12, 6) == [0, 2, 4, 7, 9, 11]
    assert evenly_spaced(4, 1) == [3]
    assert evenly_spaced(5, 5) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("strategy", "layers", "expected"),
    [
        ("uniform", 3, [0, 2, 5]),
        ("first", 3, [0, 1, 2]),
        ("last", 3, [3, 4, 5]),
        ("uniform", [1, 4], [1, 4]),
        ("uniform", range(0, 6, 2), [0, 2, 4]),
    ],
)
def test_the_student_holds_the_teachers_layers(strategy, layers, expected):
    teacher = tiny_bert(layers=6)
    student = init_student(teacher, layers, strategy=strategy)
    assert student.config.num_hidden_layers == len(expected)
    assert teacher.config.num_hidden_layers == 6
    for new, old in enumerate(expected):
        ours, theirs = student.bert.encoder.layer[new], teacher.bert.encoder.layer[old]
        for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert one.equal(other)
            assert one.data_ptr() != other.data_ptr()
    assert student.classifier.weight.equal(teacher.classifier.weight)


@pytest.mark.parametrize("name", MODELS)
def test_all_layers_give_the_same_logits(name):
    make, batch = MODELS[name]
    teacher = make(layers=3).eval()
    student = init_student(teacher, 3)
    assert not student.training
    assert student(**batch).logits.equal(teacher(**batch).logits)


@pytest.mark.parametrize("strategy", ["uniform", "first", "last"])
@pytest.mark.parametrize("name", MODELS)
def test_a_student_computes_what_its_layers_do_and_reloads(name, strategy, tmp_path):
    """Against the teacher with its other layers passed over."""
    make, batch = MODELS[name]
    teacher = make(layers=4).eval()
    numbers = {"uniform": [0, 3], "first": [0, 1], "last": [2, 3]}[strategy]
    if name == "modernbert" and strategy == "last":
        pytest.skip("its first layer is made otherwise")
    student = init_student(teacher, 2, strategy=strategy)
    shortened = copy.deepcopy(teacher)
    for stack in find_stacks(shortened).values():
        kept = [stack.layers[number] for number in numbers]
        if name == "t5" and strategy == "last":
            # Whichever layer is the first has the bias of positions.
            first = stack.layers[0].layer[0].SelfAttention
            kept[0].layer[0].SelfAttention.relative_attention_bias = first.relative_attention_bias
            kept[0].layer[0].SelfAttention.has_relative_attention_bias = True
        del stack.layers[:]
        stack.layers.extend(kept)
        setattr(stack.config, stack.field, 2)
        inner = shortened.get_submodule(stack.owner)
        setattr(inner.config, stack.field, 2)
    expected = shortened(**batch, use_cache=False) if name != "vit" else shortened(**batch)
    torch.testing.assert_close(student(**batch).logits, expected.logits)
    student.save_pretrained(tmp_path)
    loaded = type(student).from_pretrained(tmp_path).eval()
    assert loaded(**batch).logits.equal(student(**batch).logits)


def test_both_stacks_of_an_encoder_decoder_or_one():
    teacher = tiny_t5(layers=4)
    both = init_student(teacher, 2)
    assert (both.config.num_layers, both.config.num_decoder_layers) == (2, 2)
    one = init_student(teacher, {"decoder": [0]})
    assert (one.config.num_layers, one.config.num_decoder_layers) == (4, 1)
    whisper = init_student(tiny_whisper(layers=3), {"encoder": 3, "decoder": 1})
    assert (whisper.config.encoder_layers, whisper.config.decoder_layers) == (3, 1)


def test_as_many_convolutions_as_layers_are_no_stack(tmp_path):
    teacher = wav2vec2(Wav2Vec2ForSequenceClassification)(layers=2).eval()
    assert len(teacher.wav2vec2.feature_extractor.conv_layers) == teacher.config.num_hidden_layers
    student = init_student(teacher, 1)
    assert len(student.wav2vec2.feature_extractor.conv_layers) == teacher.config.num_hidden_layers
    student.save_pretrained(tmp_path)
    waves = {"input_values": torch.randn(2, 400)}
    loaded = Wav2Vec2ForSequenceClassification.from_pretrained(tmp_path).eval()
    assert loaded(**waves).logits.equal(student(**waves).logits)


def test_a_smaller_decoder_reloads_and_generates_with_its_cache(tmp_path):
    student = init_student(tiny_llama(layers=5), 2).eval()
    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.randint(5, 90, (1, 6))
    cached = loaded.generate(ids, max_new_tokens=5, do_sample=False, use_cache=True)
    plain = student.generate(ids, max_new_tokens=5, do_sample=False, use_cache=False)
    assert cached.equal(plain)


def test_dtype_and_ties_are_kept():
    teacher = tiny_gpt2(layers=3).bfloat16()
    student = init_student(teacher, 1)
    assert {parameter.dtype for parameter in student.parameters()} == {torch.bfloat16}
    assert student.lm_head.weight is student.transformer.wte.weight


@pytest.mark.parametrize("layers", [0, 7, -1, 2.0, True, "3", [], [3, 1], [0, 6], [0, 0], [-1], [0.0]])
def test_impossible_numbers_are_refused(layers):
    with pytest.raises(ValueError, match="layer of the teacher has 6, so pass 1 to 6, or a list of"):
        init_student(tiny_bert(layers=6), layers)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="`strategy` is 'middle': pass one of uniform, first, last"):
        init_student(tiny_bert(), 1, strategy="middle")
    with pytest.raises(ValueError, match="names 'decoder', but the stacks of .* are layers"):
        init_student(tiny_bert(), {"decoder": 1})
    with pytest.raises(ValueError, match="Linear is not a transformers model"):
        init_student(torch.nn.Linear(2, 2), 1)
    altered = tiny_bert(layers=3)
    altered.config.num_hidden_layers = 5
    with pytest.raises(ValueError, match="has 0 lists of layers"):
        init_student(altered, 1)
    with pytest.raises(ValueError, match="layer 2 cannot become layer 0"):
        init_student(tiny_modernbert(layers=4), 2, strategy="last")
