import copy
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import classification_rows, language_rows, tiny_bert, tiny_llama
from torch import nn
from transformers import (
    AutoModelForAudioClassification,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertForMaskedLM,
    DebertaV2Config,
    DistilBertConfig,
    ModernBertConfig,
    RobertaConfig,
    T5Config,
    Trainer,
    TrainingArguments,
    ViTConfig,
    Wav2Vec2Config,
)
from transformers.quantizers.quantizers_utils import should_convert_module

from hf_compress import quantized
from hf_compress.quantization.bnb import HEADS, guard_cpu_kernels_, head_layers, load_quantized

bnb = pytest.importorskip("bitsandbytes")
PACKED = {8: bnb.nn.Linear8bitLt, 4: bnb.nn.Linear4bit}
IDS = torch.arange(5, 17)[None]
ON_CPU = not torch.cuda.is_available()

SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 96,
}


def classifier():
    return AutoModelForSequenceClassification, tiny_bert(hidden=64)


def language_model():
    return AutoModelForCausalLM, tiny_llama(hidden=64)


def tied_language_model():
    return AutoModelForCausalLM, tiny_llama(hidden=64, tie_word_embeddings=True)


MODELS = pytest.mark.parametrize("make", [classifier, language_model, tied_language_model])
BITS = pytest.mark.parametrize("bits", [8, 4])


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS.to(model.device)).logits.cpu()


def packed(model, bits):
    return {name for name, module in model.named_modules() if isinstance(module, PACKED[bits])}


@BITS
@MODELS
def test_only_the_backbone_is_packed_and_saves_come_back_equal(make, bits, tmp_path):
    auto_class, model = make()
    model.save_pretrained(tmp_path / "float")
    loaded = load_quantized(tmp_path / "float", bits, auto_class)

    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    heads = set(head_layers(model))
    assert packed(loaded, bits) == linear - heads
    for name in heads:
        weight = loaded.get_submodule(name).weight
        assert weight.dtype == torch.float32
        assert weight.requires_grad
        assert torch.equal(weight.cpu(), model.get_submodule(name).weight)

    expected, found = logits(model), logits(loaded)
    error = (expected - found).norm() / expected.norm()
    assert 0 < error < (0.05 if bits == 8 else 0.3)

    loaded.save_pretrained(tmp_path / "packed")
    again = guard_cpu_kernels_(auto_class.from_pretrained(tmp_path / "packed"))
    assert packed(again, bits) == packed(loaded, bits)
    assert torch.equal(logits(again), found)


@BITS
@pytest.mark.parametrize(
    ("auto_class", "config"),
    [
        (AutoModelForSequenceClassification, RobertaConfig(**SMALL)),
        (AutoModelForTokenClassification, BertConfig(**SMALL)),
        (AutoModelForQuestionAnswering, BertConfig(**SMALL)),
        (AutoModelForMultipleChoice, BertConfig(**SMALL)),
        (AutoModelForSequenceClassification, DebertaV2Config(**SMALL)),
        (
            AutoModelForSequenceClassification,
            DistilBertConfig(vocab_size=96, dim=64, n_layers=1, n_heads=4),
        ),
        (AutoModelForImageClassification, ViTConfig(image_size=8, patch_size=4, **SMALL)),
    ],
    ids=lambda value: getattr(value, "__name__", None) or getattr(value, "model_type", None),
)
def test_an_untrained_head_can_be_put_on_a_quantized_body(auto_class, config, bits, tmp_path):
    whole = auto_class.from_config(config)
    whole.base_model.save_pretrained(tmp_path)
    # With the user's own call, and with the one that looks into the model.
    by_name = auto_class.from_pretrained(tmp_path, quantization_config=quantized(bits))
    by_tree = load_quantized(tmp_path, bits, auto_class)
    for model in (by_name, by_tree):
        assert packed(model, bits)
        assert all(isinstance(model.get_submodule(name), nn.Linear) for name in head_layers(whole))
        assert not packed(model, bits).intersection(head_layers(whole))
        inputs = (
            {"pixel_values": torch.zeros(1, 3, 8, 8)}
            if config.model_type == "vit"
            else {"input_ids": IDS[:, None] if "MultipleChoice" in auto_class.__name__ else IDS}
        )
        outputs = model(**{name: value.to(model.device) for name, value in inputs.items()})
        sum(value.sum() for value in outputs.values() if torch.is_tensor(value)).backward()
        for name in head_layers(whole):
            assert model.get_submodule(name).weight.grad is not None


@BITS
def test_layers_that_the_checkpoint_lacks_stay_float(bits, tmp_path):
    # A masked language model has no pooler, which the classifier's backbone has.
    BertForMaskedLM(tiny_bert(hidden=64).config).save_pretrained(tmp_path)
    model = load_quantized(tmp_path, bits, AutoModelForSequenceClassification)
    assert type(model.bert.pooler.dense) is nn.Linear
    assert packed(model, bits)
    assert logits(model).isfinite().all()


@pytest.mark.parametrize(
    ("auto_class", "config"),
    [
        (AutoModelForMaskedLM, BertConfig()),
        (AutoModelForMaskedLM, ModernBertConfig()),
        (AutoModelForMaskedLM, DistilBertConfig()),
        (AutoModelForSeq2SeqLM, T5Config()),
        (AutoModelForQuestionAnswering, T5Config()),
        (AutoModelForAudioClassification, Wav2Vec2Config()),
    ],
    ids=lambda value: getattr(value, "__name__", None) or getattr(value, "model_type", None),
)
def test_the_names_of_heads_cover_those_found_in_the_model(auto_class, config):
    with torch.device("meta"):
        model = auto_class.from_config(config)
    heads = head_layers(model)
    assert heads
    assert not [name for name in heads if should_convert_module(name, list(HEADS))]
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    kept = [name for name in layers if not should_convert_module(name, list(HEADS))]
    assert len(kept) <= len(heads) + 1  # a pooler may stay too; the blocks may not


@pytest.mark.skipif(not ON_CPU, reason="the limit is the CPU kernel's")
def test_sizes_that_the_cpu_kernel_decodes_wrongly_stay_float(tmp_path):
    tiny_bert(hidden=48).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="multiple of 64"):
        load_quantized(tmp_path, 4, AutoModelForSequenceClassification)
    tiny_bert(hidden=32).save_pretrained(tmp_path)
    model = load_quantized(tmp_path, 4, AutoModelForSequenceClassification)
    assert packed(model, 4) == {f"bert.encoder.layer.{i}.output.dense" for i in range(2)}
    assert packed(load_quantized(tmp_path, 8, AutoModelForSequenceClassification), 8) > packed(model, 4)


def test_four_bit_layers_are_kept_off_the_fused_cpu_kernel(tmp_path):
    auto_class, model = language_model()
    model.save_pretrained(tmp_path)
    loaded = load_quantized(tmp_path, 4, auto_class)
    layers = [module for module in loaded.modules() if isinstance(module, bnb.nn.Linear4bit)]
    before = [layer.weight.data.clone() for layer in layers]
    dense = copy.deepcopy(loaded).dequantize(dtype=torch.float32)
    logits(loaded)
    for layer, weight in zip(layers, before, strict=True):
        assert not layer.support_avx512bf16_for_cpu
        assert torch.equal(layer.weight.data, weight)
    torch.testing.assert_close(logits(loaded.dequantize(dtype=torch.float32)), logits(dense))


@BITS
@pytest.mark.parametrize("make", [classifier, language_model])
def test_lora_trains_on_a_packed_base(make, bits, tmp_path):
    auto_class, model = make()
    model.save_pretrained(tmp_path / "float")
    base = load_quantized(tmp_path / "float", bits, auto_class)
    causal = auto_class is AutoModelForCausalLM
    adapted = get_peft_model(
        base,
        LoraConfig(
            r=8,
            lora_alpha=32,
            target_modules="all-linear",
            task_type="CAUSAL_LM" if causal else "SEQ_CLS",
        ),
    )
    frozen = {
        name: parameter.detach().clone()
        for name, parameter in adapted.named_parameters()
        if not parameter.requires_grad
    }
    trainer = Trainer(
        adapted,
        TrainingArguments(
            tmp_path / "run",
            max_steps=40,
            per_device_train_batch_size=16,
            learning_rate=3e-3,
            lr_scheduler_type="constant",
            logging_steps=8,
            save_strategy="no",
            disable_tqdm=True,
            report_to="none",
        ),
        train_dataset=language_rows(16) if causal else classification_rows(16),
    )
    # After an evaluation too: that is where packed kernels lose the gradient.
    logits(adapted)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0]
    for name, parameter in adapted.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name])
        elif "lora_B" in name:
            assert parameter.abs().sum() > 0


@pytest.mark.parametrize("bits", [3, 16, 0, -4, 4.0, True, "8", None])
def test_other_bits_are_refused(bits):
    with pytest.raises(ValueError, match="must be 4 or 8"):
        quantized(bits)


def test_wrong_settings_are_refused(tmp_path):
    with pytest.raises(ValueError, match="for 4 bits"):
        quantized(8, compute_dtype=torch.float32)
    with pytest.raises(ValueError, match="list of module names"):
        quantized(8, skip="lm_head")
    auto_class, model = language_model()
    model.save_pretrained(tmp_path / "float")
    load_quantized(tmp_path / "float", 8, auto_class).save_pretrained(tmp_path / "packed")
    with pytest.raises(ValueError, match="quantized already"):
        load_quantized(tmp_path / "packed", 8, auto_class)


def test_four_bit_settings_survive_a_save():
    config = quantized(4)
    assert config.bnb_4bit_quant_type == "nf4"
    assert config.bnb_4bit_use_double_quant
    assert config.bnb_4bit_quant_storage == torch.uint8
    if ON_CPU:
        assert config.bnb_4bit_compute_dtype == torch.float32
    assert quantized(4, compute_dtype=torch.float16).bnb_4bit_compute_dtype == torch.float16
    assert quantized(8, skip=["a"]).llm_int8_skip_modules == ["a"]


def test_without_bitsandbytes_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as Python marks what cannot be imported
    with pytest.raises(ImportError, match=r'pip install "hf-compress\[quantization\]"'):
        quantized(8)
