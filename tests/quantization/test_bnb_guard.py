"""What the CPU kernels of bitsandbytes lose of packed weights, and that the guard keeps all of it."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from quantization.bnb_models import IDS, ON_CPU, language_model, logits
from tiny import tiny_bert
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig

from hf_compress import quantized
from hf_compress.quantization.bnb import load_quantized
from hf_compress.quantization.guard import guard_cpu_kernels_, has_fused_kernel

bnb = pytest.importorskip("bitsandbytes")


def reopened(folder):
    """A 4-bit model as a CPU with AVX512-BF16 has it; elsewhere bitsandbytes' mark is set by hand.

    There the repacking is real, and only the fused product, which has no gradient, is missing.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=single_scales())
    for layer in layers4(model):
        layer.support_avx512bf16_for_cpu = True
    return model


def single_scales():
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["lm_head"]
    )


def layers4(model):
    return [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]


def with_lora(model):
    torch.manual_seed(1)
    return get_peft_model(
        copy.deepcopy(model), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    )


def dense_weights(model):
    weights = model.dequantize(torch.float32).state_dict()
    return torch.cat([weight.flatten() for name, weight in weights.items() if "proj" in name])


def lora_gradients(model):
    adapted = with_lora(model).train()
    adapted(input_ids=IDS, labels=IDS).loss.backward()
    missing = torch.tensor([torch.nan])
    gradients = [p.grad for name, p in adapted.named_parameters() if "lora_B" in name]
    return torch.cat([missing if g is None else g.flatten() for g in gradients])


def life(model, folder):
    """What an evaluated model is worth: its gradients, and its weights in other forms."""
    logits(model)
    gradients = lora_gradients(model)
    dequantized = dense_weights(copy.deepcopy(model))
    merged = dense_weights(with_lora(model).merge_and_unload())
    model.save_pretrained(folder / "packed")
    return {
        "gradients": gradients,
        "dequantized": dequantized,
        "merged": merged,
        "saved": dense_weights(AutoModelForCausalLM.from_pretrained(folder / "packed")),
    }


@pytest.mark.skipif(not ON_CPU, reason="the repacking is the CPU's")
@pytest.mark.filterwarnings("ignore:Merge lora module")
def test_evaluated_weights_are_lost_without_the_guard_and_right_with_it(tmp_path):
    language_model()[1].save_pretrained(tmp_path)
    fresh = reopened(tmp_path)
    merged = dense_weights(with_lora(fresh).merge_and_unload())
    gradients = lora_gradients(fresh)
    dense = dense_weights(fresh)

    bare, guarded = reopened(tmp_path), reopened(tmp_path)
    guard_cpu_kernels_(guarded)
    found, lost = life(guarded, tmp_path), life(bare, tmp_path)
    assert torch.equal(found["saved"], dense)
    assert torch.equal(found["dequantized"], dense)
    assert torch.equal(found["merged"], merged)
    assert torch.equal(found["gradients"], gradients)

    assert (lost["dequantized"] - dense).norm() > 0.1 * dense.norm()
    assert (lost["merged"] - merged).norm() > 0.1 * merged.norm()
    assert (lost["saved"] - dense).norm() > 0.01 * dense.norm()
    bare = reopened(tmp_path)
    logits(bare)
    with pytest.raises(ValueError, match="load the model again"):
        guard_cpu_kernels_(bare)


@pytest.mark.skipif(not has_fused_kernel(), reason="needs a CPU with AVX512-BF16, for its fused kernel")
def test_bare_bitsandbytes_loses_what_it_evaluates_on_this_cpu(tmp_path):
    """The same with nothing set by hand: what `from_pretrained` and `load_quantized` leave."""
    language_model()[1].save_pretrained(tmp_path)
    bare = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=single_scales())
    dense, gradients = dense_weights(copy.deepcopy(bare)), lora_gradients(bare)
    lost = life(bare, tmp_path)
    assert (lost["dequantized"] - dense).norm() > 0.1 * dense.norm()
    # Either there are none, or what flows through a packed layer is missing from them.
    assert not (lost["gradients"] - gradients).norm() < 0.1 * gradients.norm()
    ours = load_quantized(tmp_path, 4, AutoModelForCausalLM)
    dense, gradients = dense_weights(copy.deepcopy(ours)), lora_gradients(ours)
    found = life(ours, tmp_path)
    assert torch.equal(found["saved"], dense)
    assert torch.equal(found["dequantized"], dense)
    assert torch.equal(found["gradients"], gradients)


@pytest.mark.skipif(not ON_CPU, reason="the kernel is the CPU's")
def test_packed_rows_that_this_cpu_decodes_wrongly_are_refused(tmp_path):
    """48 inputs are packed by a user's own settings: right on some CPUs, and wrong with AVX512."""
    model = tiny_bert(hidden=48, layers=1)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, quantization_config=quantized(4)
    )
    name = "bert.encoder.layer.0.intermediate.dense"
    packed = loaded.get_submodule(name).weight
    weight = model.get_submodule(name).weight
    error = bnb.functional.dequantize_4bit(packed.data, packed.quant_state) - weight
    if error.norm() > 0.15 * weight.norm():
        with pytest.raises(ValueError, match="decodes .* layers wrongly"):
            guard_cpu_kernels_(loaded)
    else:
        expected = logits(model)
        assert (logits(guard_cpu_kernels_(loaded)) - expected).norm() < 0.3 * expected.norm()
