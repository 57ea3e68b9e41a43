"""The loss of a head is that of transformers in other families of models too, on one batch."""

import pytest
import torch
import transformers
from distillation.heads import (
    LENGTH,
    batch_of,
    choice_rows,
    labelled_images,
    labelled_waves,
    masked_rows,
    span_rows,
    tagged_rows,
    transcribed_features,
    transcribed_waves,
    translation_rows,
)
from tiny import VOCABULARY

from hf_compress.distillation.divergences import Divergence
from hf_compress.distillation.tasks.heads import head_of

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
TEXT = {**SIZES, "max_position_embeddings": 2 * LENGTH, "pad_token_id": 0, "bos_token_id": 2}
TEXT |= {"eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
PAIRED = {
    **{"vocab_size": VOCABULARY, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1},
    **{"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32},
    **{"decoder_ffn_dim": 32, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3},
    **{"decoder_start_token_id": 2, "max_position_embeddings": 2 * LENGTH},
}
T5 = {
    **{"vocab_size": VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1},
    **{"num_heads": 2, "decoder_start_token_id": 0},
}
SOUND = {
    **SIZES,
    **{"vocab_size": 12, "conv_dim": (8, 8), "conv_kernel": (8, 4), "conv_stride": (4, 2)},
    **{"num_feat_extract_layers": 2, "num_conv_pos_embeddings": 8, "classifier_proj_size": 16},
    **{"num_conv_pos_embedding_groups": 2, "pad_token_id": 0, "feat_extract_norm": "layer"},
}
IMAGE = {**SIZES, "image_size": 16, "patch_size": 8}
DEPTHS = {"hidden_sizes": [8, 8], "depths": [1, 1]}

# type of the model: settings of its config, and the heads with their rows
FAMILIES = {
    **{
        name: (
            {**TEXT, **settings},
            {
                "TokenClassification": tagged_rows,
                "QuestionAnswering": span_rows,
                "MultipleChoice": choice_rows,
                "MaskedLM": masked_rows,
            },
        )
        for name, settings in {
            "albert": {"embedding_size": 16},
            "deberta-v2": {},
            "distilbert": {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 32},
            "electra": {"embedding_size": 16},
            "modernbert": {},
            "mpnet": {},
            "roberta": {},
        }.items()
    },
    **{
        name: (
            {**TEXT, "num_key_value_heads": 2},
            {"TokenClassification": tagged_rows, "QuestionAnswering": span_rows},
        )
        for name in ("gpt2", "llama", "qwen2")
    },
    "t5": (
        {**T5, "num_labels": 3},
        {"TokenClassification": tagged_rows, "QuestionAnswering": span_rows},
    ),
    **{
        name: (PAIRED, {"Seq2SeqLM": translation_rows})
        for name in ("blenderbot", "m2m_100", "mbart", "pegasus")
    },
    **{name: (T5, {"Seq2SeqLM": translation_rows}) for name in ("longt5", "mt5", "umt5")},
    "speech_to_text": (
        {
            **{k: v for k, v in PAIRED.items() if k != "max_position_embeddings"},
            **{"input_feat_per_channel": 32, "conv_channels": 16, "num_conv_layers": 1},
            **{"conv_kernel_sizes": [3], "max_source_positions": 80, "max_target_positions": 32},
        },
        {"SpeechSeq2Seq": transcribed_features},
    ),
    "dinov2": (IMAGE, {"ImageClassification": labelled_images}),
    "swin": (
        {
            "image_size": 16,
            "patch_size": 4,
            "embed_dim": 8,
            "depths": [1],
            "num_heads": [2],
            "window_size": 2,
        },
        {"ImageClassification": labelled_images},
    ),
    "resnet": ({**DEPTHS, "embedding_size": 8}, {"ImageClassification": labelled_images}),
    "convnext": ({**DEPTHS, "num_stages": 2}, {"ImageClassification": labelled_images}),
    **{
        name: (SOUND, {"AudioClassification": labelled_waves, "CTC": transcribed_waves})
        for name in ("hubert", "wavlm", "data2vec-audio")
    },
}
CASES = [(name, head) for name, (_, heads) in FAMILIES.items() for head in heads]


@pytest.mark.parametrize(("name", "head"), CASES)
def test_the_loss_is_the_models_own(name, head):
    settings, heads = FAMILIES[name]
    if "Classification" in head:
        settings = {**settings, "num_labels": 3}
    elif head == "QuestionAnswering":
        settings = {**settings, "num_labels": 2}
    elif head == "CTC":
        settings = {**settings, "ctc_loss_reduction": "mean", "ctc_zero_infinity": True}
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **settings)
    model = getattr(transformers, f"AutoModelFor{head}").from_config(config).eval()
    batch = batch_of(heads[head](4))
    found = head_of(model)
    with torch.no_grad():
        own = model(**batch).loss
        outputs = model(**found.inputs(model, batch))
        sums = found.task(model, batch).sums(outputs, [outputs], batch, divergence=Divergence())
    torch.testing.assert_close((sums.task / sums.items).mean(), own)
    assert sums.distillation.sum().abs() < 1e-4
    assert sums.agreement.sum() == pytest.approx(sums.items.sum().item())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_ctc_is_a_mean_over_rows_whatever_the_model_sums(reduction):
    """`ctc_loss_reduction="sum"` adds up the rows of a batch, so that it depends on how it is cut."""
    config = transformers.Wav2Vec2Config(**SOUND, ctc_loss_reduction=reduction)
    model = transformers.Wav2Vec2ForCTC(config).eval()
    batch = batch_of(transcribed_waves(6))
    with torch.no_grad():
        own = model(**batch).loss
        outputs = model(**batch)
    task = head_of(model).task(model, batch)
    sums = task.sums(outputs, [outputs], batch, divergence=Divergence())
    assert sums.items == 6
    expected = own if reduction == "mean" else own / 6
    torch.testing.assert_close(sums.task / 6, expected)


def test_ctc_distils_the_mean_over_the_real_frames_of_each_row():
    config = transformers.Wav2Vec2Config(**SOUND)
    model, teacher = (transformers.Wav2Vec2ForCTC(config).eval() for _ in range(2))
    batch = batch_of(transcribed_waves(4))
    task = head_of(model).task(model, batch)
    with torch.no_grad():
        outputs, taught = model(**batch), teacher(**batch)
    sums = task.sums(outputs, [taught], batch, divergence=Divergence(temperature=2.0))
    frames = model._get_feat_extract_output_lengths(batch["attention_mask"].sum(-1))
    expected, same = 0.0, 0.0
    for row, count in enumerate(frames):
        student_logits, teacher_logits = outputs.logits[row, :count], taught.logits[row, :count]
        kl = torch.nn.functional.kl_div(
            (student_logits / 2).log_softmax(-1),
            (teacher_logits / 2).log_softmax(-1),
            log_target=True,
            reduction="batchmean",
        )
        expected = expected + 4 * kl
        same = same + (student_logits.argmax(-1) == teacher_logits.argmax(-1)).float().mean()
    torch.testing.assert_close(sums.distillation, expected)
    torch.testing.assert_close(sums.agreement, same)
    none = task.sums(outputs, [taught], batch, divergence=Divergence(), rows=0)
    assert none == (0, 0, 0, 0)
