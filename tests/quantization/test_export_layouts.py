"""Export of weights that are in no Linear layer: Conv1D and experts."""

import json

import pytest
import torch
from quantization.reloads import INPUT, reload, rounded, tensor_bytes
from safetensors.torch import load_file
from tiny import VOCABULARY, tiny_bert, tiny_gpt2, tiny_gpt_oss, tiny_llama4, tiny_mixtral
from torch import nn
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.pytorch_utils import Conv1D

from hf_compress import QuantizationCallback, quantize_oneshot_, save_quantized
from hf_compress.quantization.calibrated import calibrated_grids
from hf_compress.targets import find_targets

pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")


def tiny_qwen3_moe():
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            moe_intermediate_size=16,
            intermediate_size=64,
            num_experts=4,
            num_experts_per_tok=2,
        )
    )


CASES = {
    "gpt2 int4 groups": (tiny_gpt2, {"group_size": 16}),
    # Its layers have 32 and 128 inputs.
    "gpt2 int4": (tiny_gpt2, {}),
    "gpt2 int3 tensor": (tiny_gpt2, {"bits": 3, "group_size": "tensor"}),
    "gpt2 zero points": (tiny_gpt2, {"symmetric": False}),
    "gpt2 groups with zero points": (tiny_gpt2, {"bits": 8, "group_size": 16, "symmetric": False}),
    "mixtral int4 groups": (tiny_mixtral, {"group_size": 16}),
    "mixtral int8": (tiny_mixtral, {"bits": 8}),
    "mixtral int4 tensor": (tiny_mixtral, {"group_size": "tensor"}),
    "qwen3-moe int2 groups": (tiny_qwen3_moe, {"bits": 2, "group_size": 8}),
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """For each case the model and its folder, reloaded without hf_compress."""
    root = tmp_path_factory.mktemp("layouts")
    results = {}
    for name, (make, scheme) in CASES.items():
        model, grids = rounded(make(), **scheme)
        save_quantized(model, root / name, grids=grids)
        results[name] = (model, root / name)
    reload(root, [folder for _, folder in results.values()])
    return results


@pytest.mark.parametrize("loaded", ["plain", "dequantized"])
@pytest.mark.parametrize("case", CASES)
def test_loads_without_the_package_as_it_was_quantized(exported, case, loaded):
    model, folder = exported[case]
    found = load_file(folder / f"{loaded}.reloaded")
    with torch.no_grad():
        assert model(INPUT).logits.equal(found["logits"])
    assert all(value.equal(found[name]) for name, value in model.state_dict().items())
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert settings["quant_method"] == "compressed-tensors"


@pytest.mark.parametrize("case", [case for case in CASES if "zero points" not in case])
def test_the_file_is_as_small_as_planned(exported, case):
    model, folder = exported[case]
    settings = {"bits": 4} | CASES[case][1]
    planned = QuantizationCallback(settings.pop("bits"), **settings).dry_run(model).packed_bytes
    assert tensor_bytes(folder) == pytest.approx(planned, rel=0.05)


def test_a_conv1d_stays_one_and_can_be_trained_on(exported):
    model, folder = exported["gpt2 int4"]
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    layer = loaded.transformer.h[0].mlp.c_fc
    assert isinstance(layer, Conv1D)
    loaded(INPUT, labels=INPUT).loss.backward()
    assert layer.weight.grad.count_nonzero() > 0
    loaded.save_pretrained(folder / "dense")
    again = AutoModelForCausalLM.from_pretrained(folder / "dense")
    assert again.transformer.h[0].mlp.c_fc.weight.equal(model.transformer.h[0].mlp.c_fc.weight)


def test_experts_left_as_floats_load_beside_packed_layers_where_that_is_known(tmp_path):
    # Files of GPT-OSS stack its experts as the model does.
    model = tiny_gpt_oss().eval()
    grids = quantize_oneshot_(model, bits=4, ignore="re:experts")
    save_quantized(model, tmp_path, grids=grids)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert loaded(INPUT).logits.equal(model(INPUT).logits)


@pytest.mark.parametrize("make", [tiny_mixtral, tiny_llama4])
def test_experts_left_as_floats_load_from_torchao(tmp_path, make):
    pytest.importorskip("torchao", reason="torchao is not installed")
    model = make().eval()
    grids = quantize_oneshot_(model, bits=4, ignore="re:experts")
    save_quantized(model, tmp_path, grids=grids, format="torchao")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert loaded(INPUT).logits.equal(model(INPUT).logits)


def without_experts(make):
    model = make()
    return model, quantize_oneshot_(model, bits=4, ignore="re:experts")


def mixed():
    model = tiny_gpt2()
    model.transformer.h[0].mlp.c_fc = nn.Linear(32, 128)
    model.transformer.h[0].mlp.c_proj = nn.Linear(128, 32)
    return rounded(model)


def an_embedding():
    model = tiny_bert()
    name = "bert.embeddings.word_embeddings"
    return model, quantize_oneshot_(tiny_bert(), bits=4) | {f"{name}.weight": None}


REFUSED = [
    (lambda: rounded(tiny_gpt_oss()), "experts that the files of a GptOssForCausalLM stack too"),
    (lambda: rounded(tiny_llama4()), "in a Llama4TextExperts, which transformers does not load"),
    (lambda: without_experts(tiny_llama4), 'Llama4TextExperts.*`ignore` and pass `format="torchao"'),
    (lambda: without_experts(tiny_mixtral), 'was not trained on a grid.*`format="torchao"` or'),
    (lambda: rounded(tiny_mixtral(), symmetric=False), "with zero points.*`symmetric=True`"),
    (mixed, "is in a Conv1D and transformer.h.0.mlp.c_fc.weight is not"),
    (an_embedding, "is in a Embedding, and compressed-tensors packs Linear, Conv1D and experts only"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED)
def test_what_transformers_would_not_load_is_refused(tmp_path, make, message):
    model, grids = make()
    with pytest.raises(ValueError, match=message):
        save_quantized(model, tmp_path / "folder", grids=grids)
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_mixtral, tiny_gpt_oss])
def test_torchao_has_linear_layers_only(tmp_path, make):
    pytest.importorskip("torchao", reason="torchao is not installed")
    model, grids = rounded(make())
    if make is not tiny_gpt2:
        grids = {name: grid for name, grid in grids.items() if "experts" in name}
    with pytest.raises(ValueError, match='packs Linear layers only: pass `format="compressed-tensors"'):
        save_quantized(model, tmp_path / "folder", grids=grids, format="torchao")
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_mixtral, tiny_gpt_oss, tiny_llama4])
def test_dense_takes_all(tmp_path, make):
    model, grids = rounded(make())
    save_quantized(model, tmp_path, grids=grids, format="dense")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(loaded.get_parameter(name).equal(model.get_parameter(name)) for name in grids)


def test_inputs_of_a_conv1d_are_refused(tmp_path):
    model, grids = rounded(tiny_gpt2(), bits=8)
    inputs = calibrated_grids(model, find_targets(model).targets, [{"input_ids": INPUT}])
    with pytest.raises(ValueError, match="in a Conv1D, whose inputs are floats.*leave `input_grids`"):
        save_quantized(model, tmp_path / "folder", grids=grids, input_grids=inputs)
    assert not (tmp_path / "folder").exists()
