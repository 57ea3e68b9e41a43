import copy

import pytest
import torch
from adaptable import CASES, MODELS
from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant, int8_vectorwise_quant
from bitsandbytes.functional import quantize_4bit as quantize
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from tiny import tiny_bert, tiny_llama
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
)
from transformers.pytorch_utils import Conv1D

from hf_compress.quantization.bnb import load_quantized, quantized
from hf_compress.quantization.guard import guard_cpu_kernels_
from hf_compress.quantization.merging import dequantize_, merge_and_requantize

bnb = pytest.importorskip("bitsandbytes")

IDS = torch.arange(5, 17).view(2, 6)
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
BATCHES = [
    {"input_ids": IDS, "attention_mask": MASK},
    {"input_ids": IDS[:1] + 9, "attention_mask": MASK[:1]},
]
BITS = pytest.mark.parametrize("bits", [8, 4])


def base_of(name, bits, folder):
    auto_class, build = MODELS[name]
    build().save_pretrained(folder)
    return load_quantized(folder, bits, auto_class)


def packed(model):
    kinds = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def with_lora(base, **config):
    torch.manual_seed(1)
    head = ["classifier"] if hasattr(base, "classifier") else None
    settings = {"r": 4, "target_modules": sorted(packed(base)), "init_lora_weights": False}
    model = get_peft_model(base, LoraConfig(modules_to_save=head, **settings | config))
    if head:
        with torch.no_grad():
            model.base_model.model.classifier.modules_to_save["default"].weight.add_(1)
    return model


def logits(model, batch):
    with torch.no_grad():
        return model.eval()(**{name: value.to(model.device) for name, value in batch.items()}).logits


def decoded(layer):
    if isinstance(layer, bnb.nn.Linear4bit):
        return dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    state = layer.state.SCB if layer.state.SCB is not None else layer.weight.SCB
    return int8_vectorwise_dequant(layer.weight.data, state)


def rounded(weight, bits):
    if bits == 4:
        return dequantize_4bit(*quantize(weight, quant_type="nf4", compress_statistics=True))
    codes, scales, _ = int8_vectorwise_quant(weight.half())
    return int8_vectorwise_dequant(codes, scales)


def differences(before, after):
    """By hand, over the predictions that are no padding."""
    apart, agree = [], []
    for batch, ours, theirs in zip(BATCHES, before, after, strict=True):
        if ours.dim() == 3:
            ours, theirs = ours[batch["attention_mask"] == 1], theirs[batch["attention_mask"] == 1]
        apart.append((ours - theirs).abs().flatten())
        agree.append((ours.argmax(-1) == theirs.argmax(-1)).float())
    apart, agree = torch.cat(apart), torch.cat(agree)
    return [pytest.approx(float(x), rel=1e-4) for x in (apart.max(), apart.mean(), agree.mean())]


def numbers(drift):
    return [drift.maximum, drift.mean, drift.agreement]


@BITS
@CASES
def test_a_copy_is_merged_rounded_once_and_measured(name, bits, tmp_path):
    base = base_of(name, bits, tmp_path / "float")
    names = set(packed(base))
    plain = [logits(base, batch) for batch in BATCHES]
    model = with_lora(base)
    adapted = [logits(model, batch) for batch in BATCHES]
    model.train()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    trainable = [parameter.requires_grad for parameter in model.parameters()]

    result = merge_and_requantize(model, BATCHES)
    merged = result.model
    assert model.training
    assert [parameter.requires_grad for parameter in model.parameters()] == trainable
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())

    assert set(packed(merged)) == names
    for each, layer in packed(merged).items():
        owner = model.base_model.model.get_submodule(each)
        delta = owner.get_delta_weight("default").detach()
        expected = rounded(decoded(owner.get_base_layer()).float() + delta, bits)
        torch.testing.assert_close(decoded(layer), expected, rtol=1e-3, atol=1e-3)

    after = [logits(merged, batch) for batch in BATCHES]
    assert numbers(result.drift) == differences(adapted, after)
    assert numbers(result.learnt) == differences(plain, adapted)
    assert 0 < result.drift.mean < 0.5 * result.learnt.mean

    merged.save_pretrained(tmp_path / "merged")
    again = guard_cpu_kernels_(MODELS[name][0].from_pretrained(tmp_path / "merged"))
    assert torch.equal(logits(again, BATCHES[0]), after[0])


def test_an_adapter_that_learnt_nothing_is_said_to_have(tmp_path):
    model = with_lora(base_of("llama", 4, tmp_path), init_lora_weights=True)
    result = merge_and_requantize(model, BATCHES)
    assert numbers(result.learnt) == [0, 0, 1]
    assert result.drift.mean < 0.01  # the second rounding finds almost the same codes


def test_a_forward_that_others_have_wrapped_is_not_taken_for_the_copys(tmp_path):
    """As trl and mixed precision do it: the copy of a closure would run the original."""
    model = with_lora(base_of("llama", 4, tmp_path))
    plain = numbers(merge_and_requantize(model, BATCHES).drift)
    base, forward = model.base_model.model, model.base_model.model.forward
    base.forward = lambda **inputs: forward(**inputs)
    assert numbers(merge_and_requantize(model, BATCHES).drift) == pytest.approx(plain, rel=1e-4)


def test_an_adapter_loaded_for_inference_stays_frozen(tmp_path):
    base = base_of("llama", 4, tmp_path / "float")
    with_lora(base).save_pretrained(tmp_path / "adapter")
    base = load_quantized(tmp_path / "float", 4, AutoModelForCausalLM)
    model = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert merge_and_requantize(model, iter(BATCHES)).learnt.mean > 0
    assert not any(parameter.requires_grad for parameter in model.parameters() if parameter.is_leaf)


@BITS
@CASES
def test_dequantized_models_are_plain_ones(name, bits, tmp_path):
    base = base_of(name, bits, tmp_path / "float")
    expected = {each: decoded(layer).float() for each, layer in packed(base).items()}
    kinds = {each: layer.source_cls for each, layer in packed(base).items()}
    base.save_pretrained(tmp_path / "packed")  # which makes a string of the dtype in its config
    logits(base, BATCHES[0])
    dense = dequantize_(base)
    assert dense is base
    assert not hasattr(dense.config, "quantization_config")
    for each, weight in expected.items():
        layer = dense.get_submodule(each)
        assert type(layer) is kinds[each]
        assert layer.weight.dtype == torch.float32
        assert torch.equal(layer.weight.T if kinds[each] is Conv1D else layer.weight, weight)
    dense.save_pretrained(tmp_path / "dense")
    again = MODELS[name][0].from_pretrained(tmp_path / "dense")
    assert torch.equal(logits(again, BATCHES[0]), logits(dense, BATCHES[0]))


def test_dequantized_in_another_dtype(tmp_path):
    dense = dequantize_(base_of("llama", 4, tmp_path), dtype=torch.bfloat16)
    assert dense.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16


def test_what_cannot_be_merged_is_refused(tmp_path):
    base = base_of("llama", 4, tmp_path)
    with pytest.raises(TypeError, match="LlamaForCausalLM: pass the PeftModel"):
        merge_and_requantize(base, BATCHES)
    with pytest.raises(ValueError, match="merge_and_unload.*merge_under_mask_"):
        merge_and_requantize(
            get_peft_model(tiny_llama(layers=1), LoraConfig(target_modules=["q_proj"])), BATCHES
        )
    model = with_lora(copy.deepcopy(base))
    with pytest.raises(TypeError, match="`batches` is a dict: pass several"):
        merge_and_requantize(model, BATCHES[0])
    with pytest.raises(ValueError, match="holds no prediction.*generator"):
        merge_and_requantize(model, [])
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_A" in name)[0, 0] = torch.nan
    with pytest.raises(ValueError, match="1 tensors of the adapter, .*lora_A.*earlier checkpoint"):
        merge_and_requantize(model, BATCHES)
    model = get_peft_model(
        copy.deepcopy(base), IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    )
    with pytest.raises(ValueError, match="IA3Model: only LoRA"):
        merge_and_requantize(model, BATCHES)


@pytest.mark.filterwarnings("ignore:(?i)merge lora module")
def test_packed_weights_are_not_merged_twice(tmp_path):
    model = with_lora(base_of("llama", 4, tmp_path))
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged already.*load the base and the adapter again"):
        merge_and_requantize(model, BATCHES)
    merged = model.merge_and_unload()
    with pytest.raises(TypeError, match="PeftModel"):
        merge_and_requantize(merged, BATCHES)


def test_a_model_without_logits_is_refused(tmp_path):
    tiny_bert(hidden=64, layers=1).base_model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path, quantization_config=quantized(4))
    with pytest.raises(ValueError, match="gives no logits"):
        merge_and_requantize(with_lora(base), BATCHES)
