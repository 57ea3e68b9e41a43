"""Every kind of head on a quantized body: new on a base checkpoint, trained, saved and reopened."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForAudioClassification,
    AutoModelForAudioFrameClassification,
    AutoModelForAudioXVector,
    AutoModelForCausalLM,
    AutoModelForCTC,
    AutoModelForImageClassification,
    AutoModelForMaskedImageModeling,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForNextSentencePrediction,
    AutoModelForObjectDetection,
    AutoModelForPreTraining,
    AutoModelForQuestionAnswering,
    AutoModelForSemanticSegmentation,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForSpeechSeq2Seq,
    AutoModelForTableQuestionAnswering,
    AutoModelForTokenClassification,
    AutoModelForUniversalSegmentation,
    AutoModelForVideoClassification,
    AutoModelForVisualQuestionAnswering,
    AutoModelForZeroShotImageClassification,
    BartConfig,
    BertConfig,
    CLIPConfig,
    DebertaV2Config,
    DistilBertConfig,
    DPTConfig,
    EomtConfig,
    FunnelConfig,
    GPT2Config,
    LlamaConfig,
    ModernBertConfig,
    RobertaConfig,
    SegformerConfig,
    T5Config,
    TapasConfig,
    VideoMAEConfig,
    ViltConfig,
    ViTConfig,
    Wav2Vec2Config,
    WhisperConfig,
    YolosConfig,
)
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module

from hf_compress import quantized
from hf_compress.quantization.bnb import load_quantized
from hf_compress.quantization.guard import guard_cpu_kernels_
from hf_compress.quantization.heads import HEADS, head_layers

bnb = pytest.importorskip("bitsandbytes")
PACKED = {8: bnb.nn.Linear8bitLt, 4: bnb.nn.Linear4bit}

IDS = torch.arange(5, 17)[None]
SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 96,
}
IMAGE = {"image_size": 32, "patch_size": 16}
DISTILBERT = {"vocab_size": 96, "dim": 64, "hidden_dim": 128, "n_layers": 1, "n_heads": 4}
BART = {
    "vocab_size": 96,
    "d_model": 64,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
}
T5 = {
    "vocab_size": 96,
    "d_model": 64,
    "d_ff": 128,
    "num_layers": 1,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
FUNNEL = {
    "vocab_size": 96,
    "block_sizes": [1, 1],
    "d_model": 64,
    "n_head": 4,
    "d_head": 16,
    "d_inner": 128,
}
WHISPER = BART | {"max_source_positions": 16, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3}
SOUND = SMALL | {
    "conv_dim": (64, 64),
    "conv_kernel": (8, 4),
    "conv_stride": (4, 4),
    "layerdrop": 0.0,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "classifier_proj_size": 64,
    "tdnn_dim": (64, 64),
    "tdnn_kernel": (3, 1),
    "tdnn_dilation": (1, 1),
    "xvector_output_dim": 64,
}
SEGFORMER = {
    "num_encoder_blocks": 2,
    "depths": [1, 1],
    "sr_ratios": [2, 1],
    "hidden_sizes": [64, 64],
    "patch_sizes": [7, 3],
    "strides": [4, 2],
    "num_attention_heads": [2, 2],
    "mlp_ratios": [2, 2],
    "decoder_hidden_size": 64,
    "drop_path_rate": 0.0,
}
DPT = IMAGE | {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "is_hybrid": False,
    "backbone_out_indices": [0, 1, 2, 3],
    "neck_hidden_sizes": [8, 8, 8, 8],
    "fusion_hidden_size": 8,
    "reassemble_factors": [4, 2, 1, 0.5],
}
EOMT = IMAGE | {
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_queries": 4,
    "num_blocks": 1,
    "num_upscale_blocks": 1,
}
CLIP = {
    "text_config": SMALL | {"max_position_embeddings": 32, "eos_token_id": 16},
    "vision_config": SMALL | IMAGE,
    "projection_dim": 64,
}
VIDEO = SMALL | IMAGE | {"num_frames": 4, "tubelet_size": 2}

ROWS = [
    (AutoModelForSequenceClassification, RobertaConfig(**SMALL)),
    (AutoModelForTokenClassification, BertConfig(**SMALL)),
    (AutoModelForQuestionAnswering, DistilBertConfig(**DISTILBERT)),
    (AutoModelForMultipleChoice, BertConfig(**SMALL)),
    (AutoModelForNextSentencePrediction, BertConfig(**SMALL)),
    (AutoModelForSequenceClassification, DebertaV2Config(**SMALL)),
    (AutoModelForMaskedLM, ModernBertConfig(**SMALL, pad_token_id=0)),
    (AutoModelForTokenClassification, FunnelConfig(**FUNNEL)),
    (AutoModelForCausalLM, GPT2Config(vocab_size=96, n_embd=64, n_layer=1, n_head=4)),
    (AutoModelForSequenceClassification, LlamaConfig(**SMALL, pad_token_id=0)),
    (AutoModelForSeq2SeqLM, BartConfig(**BART)),
    (AutoModelForQuestionAnswering, T5Config(**T5)),
    (AutoModelForImageClassification, ViTConfig(**SMALL, **IMAGE)),
    (AutoModelForObjectDetection, YolosConfig(**SMALL, image_size=(32, 32), num_detection_tokens=2)),
    (AutoModelForSemanticSegmentation, SegformerConfig(**SEGFORMER)),
    (AutoModelForAudioClassification, Wav2Vec2Config(**SOUND)),
    (AutoModelForAudioFrameClassification, Wav2Vec2Config(**SOUND)),
    (AutoModelForAudioXVector, Wav2Vec2Config(**SOUND)),
    (AutoModelForCTC, Wav2Vec2Config(**SOUND)),
    (AutoModelForSpeechSeq2Seq, WhisperConfig(**WHISPER)),
    (AutoModelForPreTraining, BertConfig(**SMALL)),
    (AutoModelForTableQuestionAnswering, TapasConfig(**SMALL, num_aggregation_labels=3)),
    (AutoModelForVisualQuestionAnswering, ViltConfig(**SMALL, **IMAGE, max_position_embeddings=32)),
    (AutoModelForZeroShotImageClassification, CLIPConfig(**CLIP)),
    (AutoModelForVideoClassification, VideoMAEConfig(**VIDEO)),
    (AutoModelForMaskedImageModeling, ViTConfig(**SMALL, **IMAGE, encoder_stride=16)),
    (AutoModelForUniversalSegmentation, EomtConfig(**EOMT)),
    (AutoModelForSemanticSegmentation, DPTConfig(**DPT)),
]
KINDS = pytest.mark.parametrize(
    ("auto_class", "config"),
    ROWS,
    ids=[f"{auto.__name__[len('AutoModelFor') :]}-{config.model_type}" for auto, config in ROWS],
)


def inputs(auto_class, config):
    if config.model_type == "wav2vec2":
        return {"input_values": torch.randn(1, 640)}
    if config.model_type == "whisper":
        return {"input_features": torch.randn(1, 80, 32), "decoder_input_ids": IDS}
    image = {"pixel_values": torch.randn(1, 3, 32, 32)}
    if config.model_type in ("vit", "yolos", "segformer", "eomt", "dpt"):
        return image
    if config.model_type in ("vilt", "clip"):
        return {"input_ids": IDS} | image
    if config.model_type == "videomae":
        return {"pixel_values": torch.randn(1, 4, 3, 32, 32)}
    if config.model_type == "tapas":
        return {"input_ids": IDS, "token_type_ids": torch.zeros(1, 12, 7, dtype=torch.long)}
    if auto_class is AutoModelForMultipleChoice:
        return {"input_ids": torch.stack([IDS, IDS + 5], 1)}
    return {"input_ids": IDS}


def outputs(model, batch):
    """All predictions in one vector."""
    found = model(**{name: value.to(model.device) for name, value in batch.items()})
    wanted = (
        "logits",
        "pred_boxes",
        "embeddings",
        "reconstruction",
        "logits_aggregation",
        "logits_per_image",
    )
    return torch.cat([value.flatten() for name, value in found.items() if name.endswith(wanted)])


def evaluated(model, batch):
    with torch.no_grad():
        return outputs(model.eval(), batch).cpu()


def packed(model, bits):
    return {name for name, module in model.named_modules() if isinstance(module, PACKED[bits])}


@pytest.mark.parametrize("bits", [8, 4])
@KINDS
def test_a_new_head_on_a_quantized_body(auto_class, config, bits, tmp_path):
    whole = auto_class.from_config(config)
    with torch.no_grad():
        for parameter in whole.parameters():  # some start as zero, and give no gradient to others
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    heads = head_layers(whole)
    whole.base_model.save_pretrained(tmp_path / "base")
    batch = inputs(auto_class, config)

    # With the user's own call, and with the one that looks into the model.
    by_name = auto_class.from_pretrained(tmp_path / "base", quantization_config=quantized(bits))
    assert evaluated(guard_cpu_kernels_(by_name), batch).isfinite().all()
    model = load_quantized(tmp_path / "base", bits, auto_class)
    for each in (by_name, model):
        assert packed(each, bits)
        for name in heads:
            assert isinstance(each.get_submodule(name), (nn.Linear, Conv1D))
            assert type(each.get_submodule(name)) not in PACKED.values()
            assert each.get_submodule(name).weight.requires_grad

    found = evaluated(model, batch)
    model.save_pretrained(tmp_path / "packed")
    again = guard_cpu_kernels_(auto_class.from_pretrained(tmp_path / "packed"))
    assert packed(again, bits) == packed(model, bits)
    weights = again.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    # A matrix product may differ in its last bit with where the file puts the weights in memory.
    torch.testing.assert_close(evaluated(again, batch), found, rtol=1e-3, atol=1e-4)

    adapted = get_peft_model(
        model, LoraConfig(r=4, target_modules=sorted(packed(model, bits)), modules_to_save=heads)
    )
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in adapted.named_parameters()}
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    predictions = outputs(adapted.train(), batch)
    (predictions * torch.randn_like(predictions)).sum().backward()
    optimizer.step()
    moved = {name for name, p in adapted.named_parameters() if not torch.equal(p, before[name])}
    assert moved <= set(trained)
    assert sum("lora_B" in name for name in moved) == len(packed(model, bits))
    assert any("modules_to_save" in name for name in moved) == bool(heads)


@KINDS
def test_names_alone_leave_out_the_heads_and_keep_the_blocks(auto_class, config):
    with torch.device("meta"):
        model = auto_class.from_config(config)
    heads = head_layers(model)
    assert not [name for name in heads if should_convert_module(name, list(HEADS))]
    layers = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    kept = [name for name in layers if not should_convert_module(name, list(HEADS))]
    assert len(kept) <= len(heads) + 1  # a pooler may stay too; the blocks may not


@pytest.mark.parametrize("bits", [8, 4])
def test_a_new_head_of_an_unknown_name_is_told_before_it_crashes(bits, tmp_path):
    config = BertConfig(**SMALL)
    AutoModelForSequenceClassification.from_config(config).base_model.save_pretrained(tmp_path)
    settings = quantized(bits, skip=["score"])
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, quantization_config=settings)
    with pytest.raises(ValueError, match=r"1 layers, classifier the first, are not in the.*load_quant"):
        guard_cpu_kernels_(model)
