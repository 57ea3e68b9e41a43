"""Models in 8 and 4 bit through bitsandbytes: loaded, saved, adapted, and what is refused."""

import sys

import pytest
import torch
from accelerate import PartialState
from peft import LoraConfig, PeftModel, get_peft_model
from quantization.bnb_models import (
    ON_CPU,
    classifier,
    language_model,
    logits,
    tied_language_model,
)
from tiny import classification_rows, language_rows, tiny_bert, tiny_llama
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertForMaskedLM,
    Trainer,
    TrainingArguments,
)

from hf_compress import quantized
from hf_compress.publishing.packed import save_packed
from hf_compress.quantization.bnb import load_quantized
from hf_compress.quantization.guard import guard_cpu_kernels_
from hf_compress.quantization.heads import head_layers
from hf_compress.quantization.merging import dequantize_

bnb = pytest.importorskip("bitsandbytes")
PACKED = {8: bnb.nn.Linear8bitLt, 4: bnb.nn.Linear4bit}

MODELS = pytest.mark.parametrize("make", [classifier, language_model, tied_language_model])
BITS = pytest.mark.parametrize("bits", [8, 4])


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
def test_layers_that_the_checkpoint_lacks_stay_float(bits, tmp_path):
    # A masked language model has no pooler, which the classifier's backbone has.
    BertForMaskedLM(tiny_bert(hidden=64).config).save_pretrained(tmp_path)
    model = load_quantized(tmp_path, bits, AutoModelForSequenceClassification)
    assert type(model.bert.pooler.dense) is nn.Linear
    assert packed(model, bits)
    assert logits(model).isfinite().all()


@pytest.mark.skipif(not ON_CPU, reason="the limit is the CPU kernel's")
def test_sizes_that_the_cpu_kernel_decodes_wrongly_stay_float(tmp_path):
    tiny_bert(hidden=48).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="multiple of 64"):
        load_quantized(tmp_path, 4, AutoModelForSequenceClassification)
    tiny_bert(hidden=32).save_pretrained(tmp_path)
    model = load_quantized(tmp_path, 4, AutoModelForSequenceClassification)
    assert packed(model, 4) == {f"bert.encoder.layer.{i}.output.dense" for i in range(2)}
    assert packed(load_quantized(tmp_path, 8, AutoModelForSequenceClassification), 8) > packed(model, 4)


@pytest.mark.skipif(not ON_CPU, reason="the limit is the fused CPU kernel's")
def test_outputs_that_are_no_multiple_of_32_are_packed_and_evaluated(tmp_path):
    narrow = tiny_llama(hidden=64, layers=1, head_dim=10)  # 4 heads: q_proj is 64 -> 40
    narrow.save_pretrained(tmp_path)
    loaded = load_quantized(tmp_path, 4, AutoModelForCausalLM)
    attention = loaded.model.layers[0].self_attn
    assert isinstance(attention.q_proj, bnb.nn.Linear4bit)
    assert attention.q_proj.out_features == 40
    assert type(attention.o_proj) is nn.Linear  # 40 inputs
    error = (logits(loaded) - logits(narrow)).norm() / logits(narrow).norm()
    assert error < 0.3


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

    trained = logits(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    again = load_quantized(tmp_path / "float", bits, auto_class)
    untrained = logits(again)
    again = PeftModel.from_pretrained(again, tmp_path / "adapter")
    torch.testing.assert_close(logits(again), trained, rtol=1e-3, atol=1e-3)
    assert (trained - untrained).abs().max() > 0.1


@pytest.mark.parametrize("bits", [3, 16, 0, -4, 4.0, True, "8", None])
def test_other_bits_are_refused(bits):
    with pytest.raises(ValueError, match="must be 4 or 8"):
        quantized(bits)


@pytest.mark.parametrize(
    ("bits", "settings", "message"),
    [
        (8, {"compute_dtype": torch.float32}, "for 4 bits.*Leave them out"),
        (8, {"storage_dtype": torch.bfloat16}, "for 4 bits.*Leave them out"),
        (4, {"compute_dtype": torch.int8}, "float32, bfloat16 or float16, got torch.int8"),
        (4, {"compute_dtype": "bfloat16"}, "float32, bfloat16 or float16, got 'bfloat16'"),
        (4, {"storage_dtype": torch.int64}, "float16, or uint8, got torch.int64"),
        (8, {"skip": "lm_head"}, r"list of module names.*pass \['lm_head'\]"),
    ],
)
def test_wrong_settings_are_refused(bits, settings, message):
    with pytest.raises(ValueError, match=message):
        quantized(bits, **settings)


def test_what_cannot_be_loaded_is_refused(tmp_path):
    auto_class, model = language_model()
    model.save_pretrained(tmp_path / "float")
    with pytest.raises(ValueError, match=r"'decoder.block' matches none of the 15 .*'model.layers.0"):
        load_quantized(tmp_path / "float", 8, auto_class, skip=["decoder.block"])
    with pytest.raises(ValueError, match="no layer to load in 8 bit.*named in `skip`"):
        load_quantized(tmp_path / "float", 8, auto_class, skip=["model.layers"])
    with pytest.raises(TypeError, match="LlamaForCausalLM: pass the path"):
        load_quantized(model, 8, auto_class)
    with pytest.raises(TypeError, match="must be a class .* got 'AutoModelForCausalLM'"):
        load_quantized(tmp_path / "float", 8, "AutoModelForCausalLM")
    with pytest.raises(ValueError, match="must be 4 or 8"):
        load_quantized(tmp_path / "float", 3, auto_class)
    load_quantized(tmp_path / "float", 8, auto_class).save_pretrained(tmp_path / "packed")
    with pytest.raises(ValueError, match="quantized already.*AutoModelForCausalLM.from_pretrained"):
        load_quantized(tmp_path / "packed", 8, auto_class)
    with pytest.raises(ValueError, match="is quantized"):
        save_packed(tmp_path / "packed", tmp_path / "sparse")
    with pytest.raises(ValueError, match="nothing to dequantize"):
        dequantize_(model)


def test_fsdp_stores_codes_and_weights_in_one_dtype(monkeypatch, tmp_path):
    auto_class, model = language_model()
    model.save_pretrained(tmp_path)
    dtype = torch.bfloat16
    loaded = load_quantized(tmp_path, 4, auto_class, compute_dtype=dtype, storage_dtype=dtype)
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    assert logits(loaded).isfinite().all()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # as `accelerate launch` and fsdp="..." set it
    assert quantized(4, compute_dtype=dtype).bnb_4bit_quant_storage == dtype
    assert quantized(4, storage_dtype=torch.uint8).bnb_4bit_quant_storage == torch.uint8


def test_one_line_says_what_stayed_in_float_and_why(caplog, tmp_path):
    tiny_bert(hidden=32).save_pretrained(tmp_path / "narrow")
    with caplog.at_level("INFO", logger="hf_compress.quantization.bnb"):
        load_quantized(
            tmp_path / "narrow", 8, AutoModelForSequenceClassification, skip=["bert.encoder.layer.1"]
        )
        if ON_CPU:
            load_quantized(tmp_path / "narrow", 4, AutoModelForSequenceClassification)
    first, *others = [r for r in caplog.records if r.name == "hf_compress.quantization.bnb"]
    assert first.levelname == "INFO"
    assert "7 of 14 linear layers in 8 bit" in first.getMessage()
    assert "and 3 more (named in `skip`); classifier (head)." in first.getMessage()
    if ON_CPU:
        (second,) = others
        assert second.levelname == "WARNING"
        assert "2 of 14 linear layers in 4 bit" in second.getMessage()
        assert (
            "and 8 more (input size 32 is no multiple of 64); classifier (head)" in second.getMessage()
        )


def test_eight_bit_says_once_that_it_casts(caplog, tmp_path):
    auto_class, model = language_model()
    model.save_pretrained(tmp_path)
    loaded = load_quantized(tmp_path, 8, auto_class)
    for _ in range(2):
        logits(loaded)
    casts = [record for record in caplog.records if "will be cast" in record.getMessage()]
    assert len(casts) <= 1


@pytest.mark.gpu
@BITS
def test_a_rank_loads_onto_its_own_gpu(bits, tmp_path):
    auto_class, model = language_model()
    model.save_pretrained(tmp_path)
    loaded = load_quantized(tmp_path, bits, auto_class)
    assert {parameter.device for parameter in loaded.parameters()} == {PartialState().device}
    assert logits(loaded).isfinite().all()


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
