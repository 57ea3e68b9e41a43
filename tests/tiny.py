"""Tiny random models and data for the suites: built from configs, never downloaded."""

import torch
from datasets import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
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

VOCABULARY = 96


def tiny_bert(num_labels=3, layers=2, hidden=32, seed=0, **config):
    torch.manual_seed(seed)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            intermediate_size=2 * hidden,
            max_position_embeddings=32,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            num_labels=num_labels,
            **config,
        )
    )


def tiny_llama(kind=LlamaForCausalLM, layers=2, hidden=32, seed=0, **config):
    """`kind` is any Llama class; `LlamaForSequenceClassification` takes `num_labels`."""
    torch.manual_seed(seed)
    return kind(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=2 * hidden,
            max_position_embeddings=64,
            pad_token_id=0,
            **config,
        )
    )


def tiny_llama_classifier(**config):
    return tiny_llama(LlamaForSequenceClassification, **config)


def classification_rows(rows=64, length=12, num_labels=3, seed=0):
    """Rows whose label is a function of their first token, so that a tiny model can learn it.

    Lengths differ from row to row; padding is id 0 with attention mask 0.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCABULARY, (rows, length), generator=generator)
    lengths = torch.randint(4, length + 1, (rows, 1), generator=generator)
    mask = (torch.arange(length) < lengths).long()
    return Dataset.from_dict(
        {
            "input_ids": (ids * mask).tolist(),
            "attention_mask": mask.tolist(),
            "labels": (ids[:, 0] % num_labels).tolist(),
        }
    )


def language_rows(rows=64, length=16, seed=0):
    """Rows of a counting language (each token is the one before plus one), ragged.

    Labels are -100 on padding.
    """
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(5, VOCABULARY, (rows, 1), generator=generator)
    ids = 5 + (start + torch.arange(length)) % (VOCABULARY - 5)
    lengths = torch.randint(4, length + 1, (rows, 1), generator=generator)
    mask = (torch.arange(length) < lengths).long()
    return Dataset.from_dict(
        {
            "input_ids": (ids * mask).tolist(),
            "attention_mask": mask.tolist(),
            "labels": torch.where(mask.bool(), ids, -100).tolist(),
        }
    )


def tiny_gpt2(layers=2, seed=0):
    torch.manual_seed(seed)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=32,
            n_layer=layers,
            n_head=4,
            n_positions=64,
            bos_token_id=0,
            eos_token_id=0,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )


def tiny_mixtral(layers=2, experts=4, seed=0):
    torch.manual_seed(seed)
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=64,
            max_position_embeddings=64,
            num_local_experts=experts,
        )
    )


def tiny_gpt_oss(layers=1, experts=4, seed=0):
    """Its experts are stored as (experts, in, out)."""
    torch.manual_seed(seed)
    return GptOssForCausalLM(
        GptOssConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            intermediate_size=24,
            max_position_embeddings=64,
            num_local_experts=experts,
            num_experts_per_tok=2,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            pad_token_id=0,
            eos_token_id=1,
        )
    )


def tiny_llama4(layers=1, experts=4, seed=0):
    """Its experts are stored as (experts, in, out), and its class does not say so."""
    torch.manual_seed(seed)
    return Llama4ForCausalLM(
        Llama4TextConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            intermediate_size=24,
            intermediate_size_mlp=64,
            max_position_embeddings=64,
            num_local_experts=experts,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=1,
        )
    )


def tiny_t5(layers=2, seed=0):
    torch.manual_seed(seed)
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY,
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=layers,
            num_heads=4,
            dropout_rate=0.0,
            decoder_start_token_id=0,
        )
    )


def tiny_vit(num_labels=3, layers=2, seed=0):
    """Takes `pixel_values` (rows, 3, 16, 16)."""
    torch.manual_seed(seed)
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=32,
            num_hidden_layers=layers,
            num_attention_heads=4,
            intermediate_size=64,
            image_size=16,
            patch_size=8,
            num_labels=num_labels,
        )
    )


def tiny_whisper(layers=2, seed=0):
    """Takes `input_features` (rows, 80, 32)."""
    torch.manual_seed(seed)
    return WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=VOCABULARY,
            d_model=32,
            encoder_layers=layers,
            decoder_layers=layers,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            max_source_positions=16,
            max_target_positions=32,
            pad_token_id=1,
            bos_token_id=2,
            eos_token_id=3,
            decoder_start_token_id=2,
            suppress_tokens=None,
            begin_suppress_tokens=None,
        )
    )


def tiny_wav2vec2(layers=1, hidden=16, neurons=16, seed=0):
    """Takes `input_values` (rows, samples)."""
    torch.manual_seed(seed)
    return Wav2Vec2ForSequenceClassification(
        Wav2Vec2Config(
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=2,
            intermediate_size=neurons,
            conv_dim=(8, 8),
            conv_kernel=(10, 8),
            conv_stride=(5, 4),
            num_feat_extract_layers=2,
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
            classifier_proj_size=8,
        )
    )


def random_images(count, seed=0):
    """(count, 3, 16, 16), as `tiny_vit` takes them."""
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def image_rows(rows=32):
    return Dataset.from_dict(
        {"pixel_values": random_images(rows).tolist(), "labels": [i % 3 for i in range(rows)]}
    )


def random_sound(count, seed=0):
    """(count, 80, 32), as `tiny_whisper` takes it."""
    return torch.randn(count, 80, 32, generator=torch.Generator().manual_seed(seed))
