import pytest
import torch
from tiny import (
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_t5,
    tiny_vit,
    tiny_wav2vec2,
    tiny_whisper,
)
from transformers import (
    ASTConfig,
    ASTForAudioClassification,
    Wav2Vec2BertConfig,
    Wav2Vec2BertForSequenceClassification,
)

from hf_compress.example_inputs import example_inputs, inputs_of_shapes

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def spectrogram():
    return ASTForAudioClassification(ASTConfig(**SMALL, max_length=24, num_mel_bins=16))


@pytest.mark.parametrize(
    ("make", "shapes"),
    [
        (tiny_bert, {"input_ids": (2, 32), "attention_mask": (2, 32)}),
        (tiny_llama, {"input_ids": (2, 64), "attention_mask": (2, 64)}),
        (tiny_gpt2, {"input_ids": (2, 64), "attention_mask": (2, 64)}),
        (tiny_vit, {"pixel_values": (2, 3, 16, 16)}),
        (tiny_whisper, {"input_features": (2, 80, 32)}),
        (tiny_wav2vec2, {"input_values": (2, 16000)}),
        (spectrogram, {"input_values": (2, 24, 16)}),
    ],
)
def test_a_model_takes_what_is_made_for_it(make, shapes):
    torch.manual_seed(0)
    model = make().eval()
    inputs = example_inputs(model, batch=2)
    assert {name: tuple(value.shape) for name, value in inputs.items()} == shapes
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.zeros(2, 1, dtype=torch.long)
    with torch.no_grad():
        output = model(**inputs)
    assert output.logits.isfinite().all()


def test_length_is_of_text_and_of_sound():
    assert example_inputs(tiny_bert(), length=7)["input_ids"].shape == (1, 7)
    assert example_inputs(tiny_t5(), length=300)["input_ids"].shape == (1, 300)  # counts no positions
    assert example_inputs(tiny_wav2vec2(), length=900)["input_values"].shape == (1, 900)


def test_tokens_are_of_the_vocabulary():
    ids = example_inputs(tiny_bert(), batch=64)["input_ids"]
    assert ids.min() >= 0
    assert ids.max() == tiny_bert().config.vocab_size - 1


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (tiny_bert, {"batch": 0}, "`batch` must be at least 1, got 0"),
        (tiny_bert, {"length": 0}, "`length` must be at least 1, got 0"),
        (tiny_bert, {"length": 9999}, "9999, and the model has 32 positions"),
        (tiny_vit, {"length": 5}, "pixel_values of ViTForImageClassification have the size"),
        (spectrogram, {"length": 5}, "leave it out"),
        (
            lambda: Wav2Vec2BertForSequenceClassification(Wav2Vec2BertConfig(**SMALL)),
            {},
            "input_features, whose shape is not known here: make a batch of your own",
        ),
    ],
)
def test_what_cannot_be_made(make, settings, message):
    with pytest.raises(ValueError, match=message):
        example_inputs(make(), **settings)


def test_shapes_of_a_report():
    made = inputs_of_shapes(
        tiny_bert(), {"input_ids": [2, 5], "token_type_ids": [2, 5], "attention_mask": [2, 5]}
    )
    assert made["token_type_ids"].sum() == 0
    assert made["attention_mask"].all()
    assert made["input_ids"].shape == (2, 5)
