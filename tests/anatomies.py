"""One row for each architecture whose structure can be removed: a tiny model, a batch, and counts."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from tiny import (
    VOCABULARY,
    classification_rows,
    language_rows,
    random_images,
    random_sound,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_mixtral,
    tiny_t5,
    tiny_vit,
    tiny_wav2vec2,
    tiny_whisper,
)
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    MistralConfig,
    MistralForCausalLM,
    MT5Config,
    MT5ForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)


def rows(make, count):
    return {name: torch.tensor(column) for name, column in make(count)[:].items()}


def text(count=8):
    return rows(classification_rows, count)


def language(count=8):
    return rows(language_rows, count)


def translation(count=8):
    """Ragged on both sides, with different lengths."""
    return {**text(count), "labels": language(count)["labels"]}


def images(count=8):
    return {"pixel_values": random_images(count), "labels": torch.arange(count) % 3}


def speech(count=8):
    return {"input_features": random_sound(count), "labels": language(count)["labels"]}


def waves(count=8):
    sound = torch.randn(count, 400, generator=torch.Generator().manual_seed(0))
    return {"input_values": sound, "labels": torch.arange(count) % 2}


def decoder(config, model, **sizes):
    """With heads of 8, as many as hidden size / 8, in two groups."""

    def make(layers=2):
        torch.manual_seed(0)
        return model(
            config(
                vocab_size=VOCABULARY,
                hidden_size=32,
                num_hidden_layers=layers,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=64,
                pad_token_id=0,
                **sizes,
            )
        )

    return make


def tiny_distilbert(layers=2):
    torch.manual_seed(0)
    return DistilBertForSequenceClassification(
        DistilBertConfig(
            vocab_size=VOCABULARY, dim=32, n_layers=layers, n_heads=4, hidden_dim=64, num_labels=3
        )
    )


def tiny_roberta(layers=2):
    torch.manual_seed(0)
    return RobertaForSequenceClassification(
        RobertaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=layers,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=32,
            num_labels=3,
        )
    )


def tiny_mt5(layers=2):
    """Gated, with fewer decoder layers, and with heads that are not hidden size / number of heads."""
    torch.manual_seed(0)
    return MT5ForConditionalGeneration(
        MT5Config(
            vocab_size=VOCABULARY,
            d_model=32,
            d_kv=4,
            d_ff=64,
            num_layers=layers,
            num_decoder_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
        )
    )


MOE = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}


@dataclass(frozen=True)
class Anatomy:
    """neuron, head, expert: the number of weights that one in one layer owns; 0 where it has none.

    For encoder-decoders a neuron in one encoder and one decoder layer, and a head in both stacks.
    feature: the number of weights that a hidden feature owns in two layers and outside of them.
    """

    make: Callable
    batch: Callable
    neuron: int
    head: int = 0
    expert: int = 0
    feature: int = 0
    generates: bool = False


LINEAR_PAIR = 32 + 1 + 32  # a row with its bias, and a column
GATED = 3 * 32
GROUP = (2 * 8 + 8 + 8) * 32 + 2 * 8 * 32  # of two query heads of 8: rows of q, k, v, columns of o
ATTENTION = 4 * 8 + 2 * 8 + 2 * 8 + 4 * 8  # of one hidden feature: columns of q, k, v, a row of o
ENDS = 2 * VOCABULARY + 1  # in the embedding, the head and the last norm

ANATOMIES = {
    "bert": Anatomy(tiny_bert, text, LINEAR_PAIR),
    "distilbert": Anatomy(tiny_distilbert, text, LINEAR_PAIR),
    "roberta": Anatomy(tiny_roberta, text, LINEAR_PAIR),
    "gpt2": Anatomy(tiny_gpt2, language, LINEAR_PAIR, generates=True),
    "llama": Anatomy(
        tiny_llama,
        language,
        GATED,
        GROUP,
        feature=2 * (2 + ATTENTION + 3 * 64) + ENDS,
        generates=True,
    ),
    "mistral": Anatomy(
        decoder(MistralConfig, MistralForCausalLM, intermediate_size=64),
        language,
        GATED,
        GROUP,
        feature=2 * (2 + ATTENTION + 3 * 64) + ENDS,
        generates=True,
    ),
    "qwen2": Anatomy(  # with biases of q, k and v
        decoder(Qwen2Config, Qwen2ForCausalLM, intermediate_size=64),
        language,
        GATED,
        GROUP + 2 * 8 + 8 + 8,
        feature=2 * (2 + ATTENTION + 3 * 64) + ENDS,
        generates=True,
    ),
    "qwen3": Anatomy(  # with heads of another size
        decoder(Qwen3Config, Qwen3ForCausalLM, intermediate_size=64, head_dim=16),
        language,
        GATED,
        2 * GROUP,
        feature=2 * (2 + 2 * ATTENTION + 3 * 64) + ENDS,
        generates=True,
    ),
    "mixtral": Anatomy(
        tiny_mixtral,
        language,
        0,
        GROUP,
        3 * 64 * 32 + 32,
        feature=2 * (2 + ATTENTION + 4 * (3 * 64 + 1)) + ENDS,
        generates=True,
    ),
    "qwen2_moe": Anatomy(
        decoder(
            Qwen2MoeConfig,
            Qwen2MoeForCausalLM,
            intermediate_size=64,
            shared_expert_intermediate_size=16,
            **MOE,
        ),
        language,
        0,
        GROUP + 2 * 8 + 8 + 8,
        3 * 16 * 32 + 32,
        feature=2 * (2 + ATTENTION + 5 * (3 * 16 + 1)) + ENDS,  # the shared expert has a gate too
        generates=True,
    ),
    "qwen3_moe": Anatomy(
        decoder(Qwen3MoeConfig, Qwen3MoeForCausalLM, intermediate_size=64, head_dim=8, **MOE),
        language,
        0,
        GROUP,
        3 * 16 * 32 + 32,
        feature=2 * (2 + ATTENTION + 4 * (3 * 16 + 1)) + ENDS,
        generates=True,
    ),
    # Three attentions of which two have a position bias of 32 buckets in their first layer.
    "t5": Anatomy(
        tiny_t5,
        translation,
        2 * 2 * 32,
        3 * 4 * 8 * 32,
        feature=2 * (5 + 3 * 4 * 32 + 2 * 2 * 64) + VOCABULARY + 2,
        generates=True,
    ),
    "mt5": Anatomy(
        tiny_mt5,
        translation,
        2 * GATED,
        3 * 4 * 4 * 32,
        feature=2 * (5 + 3 * 4 * 16 + 2 * 3 * 64) + VOCABULARY + 2,
        generates=True,
    ),
    "vit": Anatomy(tiny_vit, images, LINEAR_PAIR, 4 * 8 * 32 + 3 * 8),
    "wav2vec2": Anatomy(
        lambda layers=2: tiny_wav2vec2(layers=layers, hidden=32, neurons=64), waves, LINEAR_PAIR
    ),
    "whisper": Anatomy(tiny_whisper, speech, 2 * LINEAR_PAIR, generates=True),
}


def shaken(name, **settings):
    """The tiny model with random biases and norms too: nothing is right because it is 0 or 1."""
    model = ANATOMIES[name].make(**settings)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model.eval()
