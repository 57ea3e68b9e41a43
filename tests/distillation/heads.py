"""One tiny random model and a few rows for every kind of head, ragged and with labels left out."""

import torch
from datasets import Dataset
from tiny import VOCABULARY, random_images, random_sound
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForTokenClassification,
    MarianConfig,
    MarianMTModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
    Wav2Vec2ForSequenceClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

LENGTH = 12
SAMPLES = 200
# Spread-out logits, so that the distillation part of the gradient is as large as the task's.
SPREAD = 0.3


def build(kind, config, seed):
    torch.manual_seed(seed)
    return kind(config)


def bert(kind):
    def make(seed=0, layers=1, vocabulary=VOCABULARY, **settings):
        config = BertConfig(
            vocab_size=vocabulary,
            hidden_size=16,
            num_hidden_layers=layers,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=32,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            initializer_range=SPREAD,
            **settings,
        )
        return build(kind, config, seed)

    return make


def t5(seed=0, layers=1, vocabulary=VOCABULARY, **settings):
    config = T5Config(
        vocab_size=vocabulary,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=layers,
        num_heads=2,
        dropout_rate=0.0,
        **{"decoder_start_token_id": 0, **settings},
    )
    return build(T5ForConditionalGeneration, config, seed)


def encoder_decoder(kind, config_class):
    def make(seed=0, layers=1, vocabulary=VOCABULARY, **settings):
        config = config_class(
            vocab_size=vocabulary,
            d_model=16,
            encoder_layers=layers,
            decoder_layers=layers,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            dropout=0.0,
            init_std=SPREAD,
            **{
                **{"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3},
                **{"decoder_start_token_id": 2, "forced_eos_token_id": None},
                **settings,
            },
        )
        return build(kind, config, seed)

    return make


def text_decoder(kind, config_class):
    return lambda seed=0, **settings: encoder_decoder(kind, config_class)(
        seed, max_position_embeddings=32, **settings
    )


def whisper(seed=0, **settings):
    return encoder_decoder(WhisperForConditionalGeneration, WhisperConfig)(
        seed,
        max_source_positions=16,
        max_target_positions=32,
        **{"suppress_tokens": None, "begin_suppress_tokens": None, **settings},
    )


def vit(seed=0, layers=1, **settings):
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=16,
        patch_size=8,
        initializer_range=SPREAD,
        **settings,
    )
    return build(ViTForImageClassification, config, seed)


def wav2vec2(kind):
    def make(seed=0, layers=1, vocabulary=12, **settings):
        config = Wav2Vec2Config(
            vocab_size=vocabulary,
            hidden_size=16,
            num_hidden_layers=layers,
            num_attention_heads=2,
            intermediate_size=32,
            conv_dim=(8, 8),
            conv_kernel=(8, 4),
            conv_stride=(4, 2),
            num_feat_extract_layers=2,
            num_conv_pos_embeddings=8,
            num_conv_pos_embedding_groups=2,
            feat_extract_norm="layer",
            classifier_proj_size=16,
            initializer_range=SPREAD,
            **dict.fromkeys(
                (
                    *("hidden_dropout", "activation_dropout", "attention_dropout"),
                    *("feat_proj_dropout", "final_dropout", "layerdrop", "mask_time_prob"),
                ),
                0.0,
            ),
            **{"ctc_loss_reduction": "mean", **settings},
        )
        return build(kind, config, seed)

    return make


def text(rows, seed=1):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCABULARY, (rows, LENGTH), generator=generator)
    lengths = torch.randint(4, LENGTH + 1, (rows, 1), generator=generator)
    mask = (torch.arange(LENGTH) < lengths).long()
    return ids, mask, generator


def columns(ids, mask, **labels):
    values = {"input_ids": ids * mask, "attention_mask": mask, **labels}
    return Dataset.from_dict({name: value.tolist() for name, value in values.items()})


def tagged_rows(rows):
    """A class for each token; none on padding, nor in the whole of rows 4 and 5."""
    ids, mask, _ = text(rows)
    labels = (ids % 3).masked_fill(mask == 0, -100)
    labels[4:6] = -100
    return columns(ids, mask, labels=labels)


def span_rows(rows):
    """Row 1 without any position within the input, row 2 without an end, row 3 before the start."""
    ids, mask, generator = text(rows)
    start = torch.randint(0, 4, (rows,), generator=generator)
    end = start + torch.randint(0, 4, (rows,), generator=generator)
    start[1], end[1], end[2], start[3] = LENGTH, LENGTH + 5, LENGTH + 1, -1
    return columns(ids, mask, start_positions=start, end_positions=end)


def choice_rows(rows, choices=3):
    ids, mask, generator = text(rows * choices)
    labels = torch.randint(0, choices, (rows,), generator=generator)
    labels[2] = -100
    shape = (rows, choices, LENGTH)
    return columns(ids.view(shape), mask.view(shape), labels=labels)


def masked_rows(rows):
    """A third of the tokens is hidden by id 4; in rows 4 and 5 none."""
    ids, mask, generator = text(rows)
    hidden = (torch.rand(ids.shape, generator=generator) < 0.33) & (mask == 1)
    hidden[4:6] = False
    return columns(ids.masked_fill(hidden, 4), mask, labels=ids.masked_fill(~hidden, -100))


def target_tokens(rows, seed=3):
    ids, mask, _ = text(rows, seed)
    labels = ids[:, :8].masked_fill(mask[:, :8] == 0, -100)
    labels[4:6] = -100
    return labels


def translation_rows(rows):
    ids, mask, _ = text(rows)
    return columns(ids, mask, labels=target_tokens(rows))


def labelled_images(rows):
    labels = [i % 3 for i in range(rows)]
    return Dataset.from_dict({"pixel_values": random_images(rows).tolist(), "labels": labels})


def transcribed_features(rows):
    return Dataset.from_dict(
        {"input_features": random_sound(rows).tolist(), "labels": target_tokens(rows).tolist()}
    )


def waves(rows):
    generator = torch.Generator().manual_seed(4)
    mask = (torch.arange(SAMPLES) < torch.randint(120, SAMPLES, (rows, 1), generator=generator)).long()
    return torch.randn(rows, SAMPLES, generator=generator) * mask, mask, generator


def labelled_waves(rows):
    sound, mask, _ = waves(rows)
    labels = [i % 3 for i in range(rows)]
    return Dataset.from_dict(
        {"input_values": sound.tolist(), "attention_mask": mask.tolist(), "labels": labels}
    )


def transcribed_waves(rows):
    """One to six letters of 1 to 11 each; 0 is the blank."""
    sound, mask, generator = waves(rows)
    labels = torch.randint(1, 12, (rows, 6), generator=generator)
    lengths = torch.randint(1, 7, (rows, 1), generator=generator)
    labels = labels.masked_fill(torch.arange(6) >= lengths, -100)
    return Dataset.from_dict(
        {
            "input_values": sound.tolist(),
            "attention_mask": mask.tolist(),
            "labels": labels.tolist(),
        }
    )


MAKE_BART = text_decoder(BartForConditionalGeneration, BartConfig)
MAKE_MARIAN = text_decoder(MarianMTModel, MarianConfig)

# name: (how to make the model, its rows)
HEADS = {
    "token classification": (bert(BertForTokenClassification), tagged_rows),
    "question answering": (bert(BertForQuestionAnswering), span_rows),
    "multiple choice": (bert(BertForMultipleChoice), choice_rows),
    "masked lm": (bert(BertForMaskedLM), masked_rows),
    "t5": (t5, translation_rows),
    "bart": (MAKE_BART, translation_rows),
    "marian": (MAKE_MARIAN, translation_rows),
    "whisper": (whisper, transcribed_features),
    "image classification": (vit, labelled_images),
    "audio classification": (wav2vec2(Wav2Vec2ForSequenceClassification), labelled_waves),
    "ctc": (wav2vec2(Wav2Vec2ForCTC), transcribed_waves),
}
NUM_LABELS = {name: {"num_labels": 3} for name in HEADS if name.endswith("classification")}


def make_model(name, **settings):
    return HEADS[name][0](**{**NUM_LABELS.get(name, {}), **settings})


def make_rows(name, rows):
    return HEADS[name][1](rows)


def batch_of(dataset):
    """All rows in one batch."""
    return {name: torch.tensor(dataset[name]) for name in dataset.column_names}
