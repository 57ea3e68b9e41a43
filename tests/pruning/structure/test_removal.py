"""What was removed is gone, and the rest computes the same: here, and where only transformers is."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from anatomies import ANATOMIES, shaken
from safetensors.torch import save_file
from tiny import tiny_gpt2, tiny_llama
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3MoeForCausalLM,
    T5EncoderModel,
)

from hf_compress.pruning.structure.choice import choose_units
from hf_compress.pruning.structure.removal import prune_structure, remove_units, shrink, zero_units_
from hf_compress.pruning.structure.units import find_units

GENERATING = [name for name, row in ANATOMIES.items() if row.generates]


def inside(name):
    """Settings that halve all that can be halved of what can also be zeroed."""
    row = ANATOMIES[name]
    owned = {"ffn": row.neuron, "heads": row.head, "hidden": row.feature}
    return {kind: 0.5 * bool(weights) for kind, weights in owned.items()}


def halved(name, layers=3):
    """A model that has lost half of everything, and the first of its layers."""
    row = ANATOMIES[name]
    return prune_structure(
        shaken(name, layers=layers),
        **inside(name),
        experts=0.5 * bool(row.expert),
        layers=[1, 2] if layers == 3 and name != "mt5" else {"encoder": [1, 2], "decoder": [1]},
        score="random",
    )


@torch.no_grad()
def logits(model, batch):
    return model(**batch).logits


@pytest.mark.parametrize("name", ANATOMIES)
def test_zeroed_and_removed_units_give_the_same_logits(name):
    model, batch = shaken(name), ANATOMIES[name].batch()
    kept = choose_units(model, **inside(name), score="random")
    zeroed = copy.deepcopy(model)
    zero_units_(zeroed, kept)
    smaller = remove_units(model, kept)
    assert type(smaller) is type(model)
    expected = logits(zeroed, batch)
    largest = max(1.0, expected.abs().max().item())  # some 30 in mT5, whose head scales nothing down
    torch.testing.assert_close(logits(smaller, batch), expected, rtol=1e-5, atol=1e-5 * largest)
    assert not torch.allclose(logits(smaller, batch), logits(model, batch), atol=1e-2)
    shrunk = shrink(zeroed)
    assert shrunk.config.to_dict() == smaller.config.to_dict()
    assert all(value.equal(smaller.state_dict()[key]) for key, value in shrunk.state_dict().items())


@pytest.mark.parametrize("kept", [[1, 2], [0]])
@pytest.mark.parametrize("name", ANATOMIES)
def test_removed_layers_are_passed_by(name, kept):
    model, batch = shaken(name, layers=3), ANATOMIES[name].batch()
    stack = find_units(model, ["layers"])[0]
    choice = {stack.name: kept}
    smaller = remove_units(model, choice)

    def pass_by(module, args, output):
        return args[0] if isinstance(output, torch.Tensor) else (args[0], *output[1:])

    for number in {*range(3)} - {*kept}:
        model.get_submodule(stack.readers[number]).register_forward_hook(pass_by)
    torch.testing.assert_close(logits(smaller, batch), logits(model, batch), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_removed_experts_are_those_that_the_router_no_longer_chooses(name):
    model, batch = shaken(name), ANATOMIES[name].batch()
    choice = {u.name: [0, 2, 3] for u in find_units(model, ["experts"])}
    smaller = remove_units(model, choice)
    normalized = name == "mixtral" or model.config.norm_topk_prob

    def without_expert_1(module, args, output):
        scores = output[0].clone()
        scores[:, 1] = -torch.inf
        best = scores.softmax(-1).topk(2)
        total = best.values.sum(-1, keepdim=True) if normalized else 1.0
        return scores, best.values / total, best.indices

    for router in choice:
        model.get_submodule(router).register_forward_hook(without_expert_1)
    torch.testing.assert_close(logits(smaller, batch), logits(model, batch), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ANATOMIES)
def test_as_many_weights_go_as_counted_by_hand(name):
    row, model = ANATOMIES[name], shaken(name)
    groups = {"llama": 2, "mistral": 2}.get(name, 4 if name in ("vit", "t5", "mt5") else 2)
    neurons = 128 if name == "gpt2" else 64
    settings = {**inside(name), "hidden": 0.0}  # which has a part in what the others own
    smaller = prune_structure(model, **settings, experts=0.5 * bool(row.expert), score="random")
    bias = 2 * 32 if name in ("t5", "mt5") else 0
    gone = 2 * (neurons // 2 * row.neuron + groups // 2 * row.head + 2 * row.expert)
    gone += groups // 2 * bias
    assert model.num_parameters() - smaller.num_parameters() == gone


_STRANGER = """
import json, sys
import torch, transformers
from safetensors.torch import load_file

result = {}
for name, kind in json.loads(sys.argv[2]).items():
    model, told = getattr(transformers, kind).from_pretrained(
        f"{sys.argv[1]}/{name}", output_loading_info=True
    )
    batch = load_file(f"{sys.argv[1]}/{name}/batch.safetensors")
    expected = batch.pop("expected")
    with torch.no_grad():
        found = model.eval()(**batch).logits
    result[name] = [(found - expected).abs().max().item(), *map(list, told.values())]
assert not any(module.startswith("hf_compress") for module in sys.modules)
print(json.dumps(result))
"""


def test_a_stranger_loads_all_of_them(tmp_path):
    classes = {}
    for name, row in ANATOMIES.items():
        smaller, batch = halved(name), row.batch(4)
        smaller.save_pretrained(tmp_path / name)
        save_file(
            {key: value.contiguous() for key, value in batch.items()}
            | {"expected": logits(smaller, batch)},
            tmp_path / name / "batch.safetensors",
        )
        classes[name] = type(smaller).__name__
    run = subprocess.run(
        [sys.executable, "-I", "-c", _STRANGER, str(tmp_path), json.dumps(classes)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert {*found} == {*ANATOMIES}
    for name, (difference, *problems) in found.items():
        assert difference < 1e-5, name
        assert not any(problems), (name, problems)


@pytest.mark.parametrize("name", GENERATING)
def test_generation_with_and_without_the_cache(name):
    model = halved(name)
    batch = {key: value for key, value in ANATOMIES[name].batch(2).items() if key != "labels"}
    if "attention_mask" in batch:
        batch = {key: value[:, :4] for key, value in batch.items()}  # no padding
    cached, plain = (
        model.generate(**batch, max_new_tokens=6, min_new_tokens=6, do_sample=False, use_cache=use)
        for use in (True, False)
    )
    assert cached.equal(plain)
    assert cached.shape[1] >= 6


def test_which_weights_stay():
    model = tiny_llama()
    name = "model.layers.0.self_attn.o_proj"
    kept = {u.name: [0] for u in find_units(model, ["heads"])} | {name: [1]}
    smaller = remove_units(model, kept)
    old, new = (m.model.layers[0].self_attn for m in (model, smaller))
    assert new.q_proj.weight.equal(old.q_proj.weight[16:])
    assert new.k_proj.weight.equal(old.k_proj.weight[8:])
    assert new.o_proj.weight.equal(old.o_proj.weight[:, 16:])
    config = smaller.config
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (2, 1, 8)
    assert (new.q_proj.out_features, new.num_key_value_groups) == (16, 2)


def test_the_given_model_stays_whole_and_apart():
    model = shaken("llama").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    smaller = prune_structure(model, ffn=0.5, score="random")
    assert smaller.training
    assert model.config.intermediate_size == 64
    with torch.no_grad():
        for parameter in smaller.parameters():
            parameter.zero_()
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["gpt2", "t5", "whisper"])
def test_tied_weights_stay_tied_and_half_precision_stays_half(name):
    smaller = prune_structure(shaken(name).bfloat16(), ffn=0.5, score="magnitude")
    assert {p.dtype for p in smaller.parameters()} == {torch.bfloat16}
    assert smaller.get_output_embeddings().weight is smaller.get_input_embeddings().weight


def test_round_to():
    smaller = prune_structure(tiny_llama(), ffn=0.45, round_to=8, score="magnitude")
    assert smaller.config.intermediate_size == 32  # 35.2 neurons, to the nearest multiple
    assert prune_structure(tiny_llama(), ffn=0.45, score="magnitude").config.intermediate_size == 35


def test_both_stacks_or_one():
    model = shaken("whisper", layers=3)
    config = prune_structure(model, layers=1, score="random").config
    assert (config.encoder_layers, config.decoder_layers) == (1, 1)
    config = prune_structure(model, layers={"decoder": 2}, score="random").config
    assert (config.encoder_layers, config.decoder_layers) == (3, 2)


def test_what_a_config_says_of_single_layers_follows_them():
    types = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=96,
            hidden_size=32,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=64,
            layer_types=types,
            sliding_window=4,
            use_sliding_window=True,
        )
    ).eval()
    smaller = prune_structure(model, layers=[0, 1, 3])
    assert smaller.config.layer_types == [types[0], types[1], types[3]]
    assert [layer.self_attn.layer_idx for layer in smaller.model.layers] == [0, 1, 2]


def test_a_base_model_and_a_size_that_gpt2_leaves_unsaid():
    model = tiny_gpt2()
    assert model.config.n_inner is None
    assert prune_structure(model.transformer, ffn=0.5, score="random").config.n_inner == 64
    stated = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=2, n_inner=12))
    assert prune_structure(stated, ffn=0.5, score="random").config.n_inner == 6


def test_an_encoder_alone():
    model = T5EncoderModel(shaken("t5", layers=3).config).eval()
    smaller = prune_structure(model, ffn=0.5, heads=0.5, layers=[1, 2], score="random")
    assert (smaller.config.d_ff, smaller.config.num_heads, smaller.config.num_layers) == (32, 2, 2)
    bias = smaller.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    assert bias.shape == (32, 2)
    assert smaller(torch.ones(1, 3).long()).last_hidden_state.isfinite().all()


def test_a_mixture_with_experts_in_some_layers():
    config = ANATOMIES["qwen3_moe"].make().config
    config.mlp_only_layers = [0]
    model = Qwen3MoeForCausalLM(config)
    (experts,) = find_units(model, ["experts"])
    assert experts.name == "model.layers.1.mlp.gate"
    smaller = prune_structure(model, experts=0.5, heads=0.5, score="random")
    assert smaller.config.num_experts == 2
    with pytest.raises(ValueError, match="which of them have experts follows from their number"):
        prune_structure(model, layers=1, score="random")


def test_units_must_be_known_and_equally_many():
    model = tiny_llama()
    first, second = find_units(model, ["ffn"])
    with pytest.raises(ValueError, match="'nowhere' is no place of units; there are model.layers.0"):
        remove_units(model, {"nowhere": [0]})
    with pytest.raises(
        ValueError, match="one `intermediate_size` for all, but 2 would stay in .*and 64"
    ):
        remove_units(model, {first.name: [0, 1]})
    with pytest.raises(ValueError, match=r"\[64\] cannot stay"):
        remove_units(model, {first.name: [64], second.name: [0]})
    with pytest.raises(ValueError, match="cannot be zeroed"):
        zero_units_(model, {"model.layers": [0]})


def test_a_model_without_zeros_cannot_shrink():
    with pytest.raises(ValueError, match="is wholly zero"):
        shrink(tiny_llama())


def test_a_layer_may_keep_another_number_when_it_goes_itself():
    model = tiny_llama(layers=2)
    first, second = find_units(model, ["ffn"])
    smaller = remove_units(model, {second.name: list(range(8)), "model.layers": [1]})
    assert smaller.config.intermediate_size == 8
