import copy

import pytest
import torch
from adaptable import CASES, MODELS
from peft import IA3Config, LoraConfig, get_peft_model
from peft.utils.integrations import dequantize_module_weight
from tiny import tiny_llama
from torch import nn
from transformers import (
    AutoModelForCausalLM,
)
from transformers.pytorch_utils import Conv1D

from hf_compress.pruning.lora import merge_under_mask_
from hf_compress.quantization.bnb import load_quantized

IDS = torch.arange(5, 17)[None]


def targets(model):
    blocks = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    return [name for name in blocks if not name.startswith(("lm_head", "classifier"))]


def sparse(model):
    """Half of each target is zero."""
    for name in targets(model):
        weight = model.get_submodule(name).weight
        weight.data[weight.abs() < weight.abs().median()] = 0
    return model


def adapted(base, names=None, **config):
    torch.manual_seed(1)
    head = ["classifier"] if hasattr(base, "classifier") else None
    model = get_peft_model(
        base,
        LoraConfig(
            r=4,
            target_modules=names or targets(base),
            modules_to_save=head,
            init_lora_weights=False,
            **config,
        ),
    )
    if head:
        with torch.no_grad():
            model.base_model.model.classifier.modules_to_save["default"].weight.add_(1)
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def zeros(model, names):
    return sum(int((model.get_submodule(name).weight == 0).sum()) for name in names)


@CASES
def test_zeros_stay_where_the_ordinary_merge_loses_them(name, tmp_path):
    auto_class, build = MODELS[name]
    base = sparse(build())
    names = targets(base)
    before = {each: base.get_submodule(each).weight.detach().clone() for each in names}
    count = zeros(base, names)
    assert count > 0.49 * sum(weight.numel() for weight in before.values())

    model = adapted(base)
    ordinary = copy.deepcopy(model).merge_and_unload()
    assert zeros(ordinary, names) == 0

    merged = merge_under_mask_(model)
    assert merged.zeros_before == merged.zeros_after == count == zeros(merged.model, names)
    assert set(merged.zeros) == {f"{each}.weight" for each in names}
    for each in names:
        weight = merged.model.get_submodule(each).weight
        expected = ordinary.get_submodule(each).weight * (before[each] != 0)
        torch.testing.assert_close(weight, expected)
        assert not torch.equal(weight, before[each])
    if name == "bert":
        assert torch.equal(merged.model.classifier.weight, ordinary.classifier.weight)

    merged.model.save_pretrained(tmp_path)
    again = auto_class.from_pretrained(tmp_path)
    assert zeros(again, names) == count
    torch.testing.assert_close(logits(again), logits(merged.model))


@pytest.mark.parametrize("given", [False, True], ids=["own zeros", "pattern"])
@pytest.mark.parametrize("bits", [8, 4])
@CASES
def test_over_a_quantized_base(name, bits, given, tmp_path):
    pytest.importorskip("bitsandbytes")
    auto_class, build = MODELS[name]
    dense = sparse(build())
    names = targets(dense)
    dense.save_pretrained(tmp_path / "sparse")
    base = load_quantized(tmp_path / "sparse", bits, auto_class)
    model = adapted(base, names)
    pruned, expected = {}, {}
    for each in names:
        pruned[each] = dense.get_submodule(each).weight == 0
        layer = model.base_model.model.get_submodule(each)
        weight, delta = (
            dequantize_module_weight(layer.get_base_layer()),
            layer.get_delta_weight("default"),
        )
        if isinstance(dense.get_submodule(each), Conv1D) and isinstance(
            layer.get_base_layer(), nn.Linear
        ):
            weight, delta = weight.T, delta.T
        assert not weight[pruned[each]].any()
        expected[each] = (weight + delta) * ~(pruned[each] if given else weight == 0)

    merged = merge_under_mask_(model, dense.state_dict() if given else None)
    plain = merged.model
    assert not hasattr(plain.config, "quantization_config")
    for each in names:
        layer = plain.get_submodule(each)
        assert type(layer) is type(dense.get_submodule(each))
        torch.testing.assert_close(layer.weight, expected[each])
    count = sum(int(mask.sum()) for mask in pruned.values())
    assert merged.zeros_after == zeros(plain, names)
    assert merged.zeros_after == count if given else merged.zeros_after == merged.zeros_before >= count

    plain.save_pretrained(tmp_path / "merged")
    again = auto_class.from_pretrained(tmp_path / "merged")
    assert again.dtype == dense.dtype
    assert zeros(again, names) == merged.zeros_after
    torch.testing.assert_close(logits(again), logits(plain))


@pytest.mark.parametrize("bits", [8, 4])
def test_a_lora_that_leaves_the_zeros_alone_is_merged_without_loss(bits, tmp_path):
    pytest.importorskip("bitsandbytes")
    name = "model.layers.0.mlp.gate_proj"
    dense = tiny_llama(hidden=64, layers=1)
    dense.get_submodule(name).weight.data[:64] = 0
    dense.save_pretrained(tmp_path)
    model = adapted(load_quantized(tmp_path, bits, AutoModelForCausalLM), [name])
    model.base_model.model.get_submodule(name).lora_B["default"].weight.data[:64] = 0
    trained = logits(model)
    merged = merge_under_mask_(model, dense.state_dict())
    assert zeros(merged.model, [name]) == 64 * 64
    torch.testing.assert_close(logits(merged.model), trained, rtol=0, atol=0.02)


def test_only_the_active_adapter_is_merged():
    base = sparse(tiny_llama(hidden=64, layers=1))
    names = targets(base)
    before = base.get_submodule(names[0]).weight.detach().clone()
    model = adapted(base, names)
    model.add_adapter("other", LoraConfig(r=2, target_modules=names, init_lora_weights=False))
    model.set_adapter("other")
    delta = model.base_model.model.get_submodule(names[0]).get_delta_weight("other").detach()
    merged = merge_under_mask_(model)
    weight = merged.model.get_submodule(names[0]).weight
    torch.testing.assert_close(weight, before + delta * (before != 0))


def test_low_precision_bases_are_merged_in_full_precision():
    base = sparse(tiny_llama(hidden=64, layers=1)).to(torch.bfloat16)
    name = targets(base)[0]
    before = base.get_submodule(name).weight.detach().clone()
    model = adapted(base)
    layer = model.base_model.model.get_submodule(name)
    delta = layer.get_delta_weight("default").detach()
    assert delta.dtype == torch.float32
    merged = merge_under_mask_(model)
    expected = ((before + delta) * (before != 0)).to(torch.bfloat16)
    assert torch.equal(merged.model.get_submodule(name).weight, expected)


def test_wrong_inputs_are_refused():
    with pytest.raises(TypeError, match="PeftModel"):
        merge_under_mask_(tiny_llama())
    model = adapted(sparse(tiny_llama(hidden=64, layers=1)))
    with pytest.raises(ValueError, match="`pattern` lacks"):
        merge_under_mask_(model, {})
    with pytest.raises(ValueError, match="no zero"):
        merge_under_mask_(adapted(tiny_llama(hidden=64, layers=1)))
    with pytest.raises(ValueError, match="plain LoRA"):
        merge_under_mask_(adapted(sparse(tiny_llama(hidden=64, layers=1)), use_dora=True))
    with pytest.raises(ValueError, match="plain LoRA"):
        merge_under_mask_(adapted(sparse(tiny_llama(hidden=64, layers=1)), lora_bias=True))
    model = adapted(sparse(tiny_llama(hidden=64, layers=1)))
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        merge_under_mask_(model)
    model = get_peft_model(
        sparse(tiny_llama()), IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    )
    with pytest.raises(ValueError, match="only LoRAs of linear layers"):
        merge_under_mask_(model)
    embedding = get_peft_model(sparse(tiny_llama()), LoraConfig(target_modules=["embed_tokens"]))
    with pytest.raises(ValueError, match="only LoRAs of linear layers"):
        merge_under_mask_(embedding)
