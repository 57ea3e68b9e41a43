import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_bert, tiny_gpt_oss, tiny_llama, tiny_llama4
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2ForSequenceClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from hf_compress.targets import find_targets

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1}


def gpt2():
    return GPT2LMHeadModel(
        GPT2Config(n_layer=1, n_embd=32, n_head=4, vocab_size=99, bos_token_id=0, eos_token_id=0)
    )


def t5():
    return T5ForConditionalGeneration(
        T5Config(num_layers=1, d_model=32, d_ff=64, num_heads=4, vocab_size=99)
    )


def mixtral():
    return MixtralForCausalLM(
        MixtralConfig(**SMALL, num_key_value_heads=2, vocab_size=99, num_local_experts=4)
    )


def vit():
    return ViTForImageClassification(ViTConfig(**SMALL, image_size=16, patch_size=8))


def wav2vec2():
    return Wav2Vec2ForSequenceClassification(
        Wav2Vec2Config(
            **SMALL,
            conv_dim=(32, 32),
            conv_stride=(2, 2),
            conv_kernel=(3, 3),
            num_feat_extract_layers=2,
            num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=4,
        )
    )


def whisper():
    return WhisperForConditionalGeneration(
        WhisperConfig(
            encoder_layers=1,
            decoder_layers=1,
            d_model=32,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            vocab_size=99,
            pad_token_id=1,
            bos_token_id=2,
            eos_token_id=3,
            decoder_start_token_id=2,
            suppress_tokens=None,
            begin_suppress_tokens=None,
        )
    )


# Weights of one encoder or decoder layer, and what stands beside them.
@pytest.mark.parametrize(
    ("build", "targets", "reasons"),
    [
        (lambda: tiny_bert(layers=1), 6 + 1, {"embedding", "bias or norm", "output head"}),
        (lambda: tiny_llama(layers=1), 7, {"embedding", "bias or norm", "output head"}),
        (
            gpt2,
            4,
            {"tied: the output head and the embedding are one tensor", "embedding", "bias or norm"},
        ),
        (
            t5,
            6 + 10,
            {"tied: the output head and the embedding are one tensor", "embedding", "bias or norm"},
        ),
        (mixtral, 4 + 2, {"embedding", "router", "bias or norm", "output head"}),
        (
            vit,
            6,
            {
                "ViTEmbeddings weights are compressed only when named",
                "Conv2d weights are compressed only when named",
                "bias or norm",
                "output head",
            },
        ),
        (
            whisper,
            6 + 10,
            {
                "Conv1d weights are compressed only when named",
                "bias or norm",
                "frozen: it is not trained",
                "tied: the output head and the embedding are one tensor",
                "embedding",
            },
        ),
        (
            wav2vec2,
            6,
            {
                "projection of raw sound, the embedding of its model",
                "bias or norm",
                "Conv1d weights are compressed only when named",
                "ParametrizationList weights are compressed only when named",
                "output head",
            },
        ),
    ],
    ids=["bert", "llama", "gpt2", "t5", "mixtral", "vit", "whisper", "wav2vec2"],
)
def test_defaults(build, targets, reasons):
    model = build()
    selection = find_targets(model)
    assert len(selection.targets) == targets
    assert set(selection.skipped.values()) == reasons
    assert set(selection.targets) | set(selection.skipped) == {n for n, _ in model.named_parameters()}


def test_input_dimension_of_each_layout():
    assert {t.input_dim for t in find_targets(tiny_bert()).targets.values()} == {1}
    assert {t.input_dim for t in find_targets(gpt2()).targets.values()} == {0}
    experts = find_targets(mixtral()).targets["model.layers.0.mlp.experts.down_proj"]
    assert experts.input_dim == -1
    assert experts.param.shape == (4, 32, 64)
    for transposed, name in ((tiny_gpt_oss(), "mlp"), (tiny_llama4(), "feed_forward")):
        experts = find_targets(transposed).targets[f"model.layers.0.{name}.experts.down_proj"]
        assert experts.input_dim == -2
        assert experts.param.shape == (4, 24, 32)


def test_the_stacked_biases_of_experts_are_biases():
    skipped = find_targets(tiny_gpt_oss()).skipped
    assert skipped["model.layers.0.mlp.experts.down_proj_bias"] == "bias or norm"


def test_a_tied_head_is_not_pruned_by_way_of_its_module():
    with pytest.raises(ValueError, match="1 x tied"):
        find_targets(tiny_llama(tie_word_embeddings=True), "embed_tokens")


@pytest.mark.parametrize(
    ("targets", "ignore", "count"),
    [
        ("query", None, 2),
        (["query", "key"], None, 4),
        ("bert.encoder.layer.1", None, 6),
        ("layer.1", None, 6),
        ("re:attention.*weight", None, 8),
        ("Linear", ["re:attention"], 5),
        (None, "BertPooler", 13),
        (None, "pooler", 12),
        ("classifier", None, 1),
    ],
)
def test_entries(targets, ignore, count):
    if ignore == "BertPooler":
        with pytest.raises(ValueError, match="matches no weight"):
            find_targets(tiny_bert(), targets, ignore)
    else:
        assert len(find_targets(tiny_bert(), targets, ignore).targets) == count


def test_a_layer_number_is_a_whole_part_of_the_name():
    model = tiny_bert(layers=12)
    assert all(".layer.1." in name for name in find_targets(model, "layer.1").targets)


def test_packed_weights_are_left_out_with_a_reason():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    assert "packed as torch.uint8" in find_targets(model).skipped["0.weight"]


def test_an_adapted_model_has_nothing_to_prune():
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="frozen.*adapter"):
        find_targets(model)


@pytest.mark.parametrize(
    ("targets", "ignore", "message"),
    [
        ("qeury", None, "qeury.*near names: query"),
        ("Liner", None, "near names: Linear"),
        (None, "atention", "near names: attention"),
        ("re:nothing_like_it", None, "matches no weight"),
        ("re:(", None, "no pattern"),
        ([""], None, "pass class names"),
        ("Linear", "Linear", "leave no weight"),
        ("Embedding", None, "leave no weight"),
    ],
)
def test_refusals(targets, ignore, message):
    with pytest.raises(ValueError, match=message):
        find_targets(tiny_bert(), targets, ignore)
