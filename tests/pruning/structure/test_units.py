"""What the units are, what they are worth, and what a model cannot lose."""

import pytest
import torch
import torch.nn.functional as F
from anatomies import ANATOMIES, shaken, text
from peft import LoraConfig, get_peft_model
from tiny import tiny_bert, tiny_gpt2, tiny_llama, tiny_t5
from torch import nn
from transformers import AutoModelForCausalLM, OPTConfig, OPTForCausalLM

from hf_compress import quantized
from hf_compress.pruning.structure.choice import choose_units
from hf_compress.pruning.structure.removal import prune_structure
from hf_compress.pruning.structure.scores import score_units
from hf_compress.pruning.structure.units import find_units


def units(model, kind):
    return {u.name: u for u in find_units(model, [kind])}


def test_the_units_of_a_gated_decoder_with_two_groups():
    model = tiny_llama()
    heads = units(model, "heads")["model.layers.1.self_attn.o_proj"]
    assert heads.count == 2
    assert {s.name.split(".")[-2]: (s.dim, s.width) for s in heads.slices} == {
        "q_proj": (0, 16),
        "k_proj": (0, 8),
        "v_proj": (0, 8),
        "o_proj": (1, 16),
    }
    assert heads.slices[0].entries([1]).tolist() == list(range(16, 32))
    ffn = units(model, "ffn")["model.layers.0.mlp.down_proj"]
    assert ffn.count == 64
    assert [(s.name.split(".")[-2], s.dim, s.width) for s in ffn.slices] == [
        ("gate_proj", 0, 1),
        ("up_proj", 0, 1),
        ("down_proj", 1, 1),
    ]


def test_conv1d_has_its_features_the_other_way_round():
    ffn = units(tiny_gpt2(), "ffn")["transformer.h.0.mlp.c_proj"]
    assert ffn.count == 128  # 4 x 32, which the config leaves unsaid
    assert {s.name.removeprefix("transformer.h.0.mlp."): s.dim for s in ffn.slices} == {
        "c_fc.weight": 1,
        "c_fc.bias": 0,
        "c_proj.weight": 0,
    }


def test_heads_that_share_a_position_bias_are_one_unit_in_all_layers():
    model = tiny_t5()
    heads = units(model, "heads")
    assert list(heads) == [
        "encoder.block.*.layer.0.SelfAttention.o",
        "decoder.block.*.layer.0.SelfAttention.o",
        "decoder.block.0.layer.1.EncDecAttention.o",
        "decoder.block.1.layer.1.EncDecAttention.o",
    ]
    names = [s.name for s in heads["encoder.block.*.layer.0.SelfAttention.o"].slices]
    assert "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight" in names
    assert len(names) == 2 * 4 + 1


@pytest.mark.parametrize("name", ANATOMIES)
def test_every_weight_of_a_unit_is_counted_once(name):
    model = shaken(name)
    row = ANATOMIES[name]
    owned = dict.fromkeys(("ffn", "heads", "experts", "hidden"), 0)
    for u in find_units(model):
        if u.kind != "layers":
            owned[u.kind] += sum(s.param.numel() // u.count for s in u.slices)
    stacks = 2 if model.config.is_encoder_decoder else 1
    layers = 2
    bias = 2 * 32 if name in ("t5", "mt5") else 0
    assert owned["ffn"] == layers * row.neuron
    assert owned["heads"] == layers * row.head + bias * bool(row.head)
    assert owned["experts"] == layers * row.expert
    assert owned["hidden"] == row.feature
    assert len([u for u in find_units(model) if u.kind == "layers"]) == stacks


def split(batch, *sizes):
    """The rows in several batches, padded no further than each needs."""
    parts = [
        dict(zip(batch, columns, strict=True))
        for columns in zip(*(v.split(sizes) for v in batch.values()), strict=True)
    ]
    for part in parts:
        if "attention_mask" in part:
            length = int(part["attention_mask"].sum(1).max())
            for key in ("input_ids", "attention_mask"):
                part[key] = part[key][:, :length]
            if batch["labels"].shape == batch["input_ids"].shape:
                part["labels"] = part["labels"][:, :length]
    return parts


@pytest.mark.parametrize("score", ["taylor", "activation"])
@pytest.mark.parametrize("name", ANATOMIES)
def test_scores_do_not_depend_on_the_cut_of_the_calibration_data(name, score):
    model = shaken(name, layers=3)
    batch = ANATOMIES[name].batch(8)
    found = find_units(model)
    whole = score_units(model, found, score=score, calibration=[batch], seed=0)
    parts = score_units(model, found, score=score, calibration=split(batch, 3, 1, 4), seed=0)
    assert {*whole} == {u.name for u in found}
    for unit in found:
        assert whole[unit.name].shape == (unit.count,)
        assert (whole[unit.name] > 0).float().mean() > 0.5, unit.name  # a ReLU may be dead
        torch.testing.assert_close(parts[unit.name], whole[unit.name], rtol=1e-3, atol=1e-7)


def single_rows(batch):
    return [
        {key: value[i : i + 1] for key, value in batch.items()} for i in range(len(batch["labels"]))
    ]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("bert", "ffn"),
        ("gpt2", "ffn"),
        ("llama", "heads"),
        ("t5", "heads"),
        ("llama", "hidden"),
        ("t5", "hidden"),
    ],
)
def test_taylor_is_the_sum_of_weight_times_gradient_row_by_row(name, kind):
    model = shaken(name)
    batch = ANATOMIES[name].batch(4)
    found = find_units(model, [kind])
    expected = {u.name: torch.zeros(u.count) for u in found}
    for row in single_rows(batch):
        model.zero_grad()
        labels = row["labels"][:, 1:] if name in ("gpt2", "llama") else row["labels"]
        (model(**row).loss * (labels != -100).sum()).backward()
        for u in found:
            sums = [
                (s.param * s.param.grad).movedim(s.dim, 0).reshape(u.count, -1).sum(1)
                for s in u.reading
            ]
            expected[u.name] += sum(sums).abs()
    model.zero_grad()
    found_scores = score_units(model, found, score="taylor", calibration=[batch], seed=0)
    for u in found:
        torch.testing.assert_close(
            found_scores[u.name].float(), expected[u.name].detach(), rtol=1e-3, atol=1e-6
        )


@pytest.mark.parametrize("name", ["bert", "whisper"])
def test_taylor_of_a_layer_is_the_slope_of_passing_it_by(name):
    model = shaken(name).double()
    batch = {
        key: value.double() if value.is_floating_point() else value
        for key, value in ANATOMIES[name].batch(1).items()
    }
    found = find_units(model, ["layers"])[-1]
    (score,) = [score_units(model, [found], score="taylor", calibration=[batch], seed=0)[found.name]]

    def loss(gate):
        def mix(module, args, output):
            after = output if isinstance(output, torch.Tensor) else output[0]
            mixed = args[0] + gate * (after - args[0])
            return mixed if isinstance(output, torch.Tensor) else (mixed, *output[1:])

        handle = model.get_submodule(found.readers[1]).register_forward_hook(mix)
        with torch.no_grad():
            value = model(**batch).loss.item()
        handle.remove()
        return value

    items = (batch["labels"] != -100).sum().item()
    slope = items * abs(loss(1 + 1e-5) - loss(1 - 1e-5)) / 2e-5
    assert score[1].item() == pytest.approx(slope, rel=1e-3)


def test_activation_is_what_a_unit_adds_and_padding_does_not_count():
    model = shaken("bert")
    batch = text(6)
    name = "bert.encoder.layer.1.output.dense"
    seen = {}
    handle = model.get_submodule(name).register_forward_pre_hook(lambda m, a: seen.update(x=a[0]))
    model(**batch)
    handle.remove()
    tokens = seen["x"][batch["attention_mask"].bool()]
    weight = model.get_submodule(name).weight
    expected = torch.stack([torch.outer(tokens[:, u], weight[:, u]).norm() for u in range(64)])
    scores = score_units(
        model, find_units(model, ["ffn"]), score="activation", calibration=[batch], seed=0
    )
    torch.testing.assert_close(scores[name].float(), expected.detach(), rtol=1e-4, atol=1e-6)


def test_activation_of_layers_and_experts_by_hand():
    model = shaken("mixtral")
    batch = ANATOMIES["mixtral"].batch(4)
    tokens = batch["attention_mask"].bool().flatten()
    states = model(**batch, output_hidden_states=True, output_router_logits=True)
    scores = score_units(
        model, find_units(model, ["layers", "experts"]), score="activation", calibration=[batch], seed=0
    )
    before, after = (state.flatten(0, 1)[tokens] for state in states.hidden_states[:2])
    influence = (1 - F.cosine_similarity(before, after)).sum()
    assert scores["model.layers"][0].item() == pytest.approx(influence.item(), rel=1e-3)
    chosen = states.router_logits[1][tokens].softmax(-1).topk(2)
    weights = chosen.values / chosen.values.sum(-1, keepdim=True)
    expected = torch.zeros(4).index_add(0, chosen.indices.flatten(), weights.flatten())
    torch.testing.assert_close(scores["model.layers.1.mlp.gate"].float(), expected.detach())


def test_magnitude_by_hand():
    model = shaken("bert")
    layer = model.bert.encoder.layer[0]
    scores = score_units(
        model, find_units(model, ["ffn", "layers"]), score="magnitude", calibration=None, seed=0
    )
    up, down = layer.intermediate.dense, layer.output.dense
    owned = torch.cat([up.weight[5], up.bias[5:6], down.weight[:, 5]])
    assert scores["bert.encoder.layer.0.output.dense"][5].item() == pytest.approx(owned.norm().item())
    everything = torch.cat([p.flatten() for p in layer.parameters()])
    assert scores["bert.encoder.layer"][0].item() == pytest.approx(everything.norm().item())


def test_the_lowest_go_and_random_follows_its_seed():
    model = shaken("bert")
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight[:, ::2] = 0.0
        model.bert.encoder.layer[0].intermediate.dense.weight[::2] = 0.0
    kept = choose_units(model, ffn=0.5, score="magnitude")
    assert kept["bert.encoder.layer.0.output.dense"] == list(range(1, 64, 2))
    first, again, other = (choose_units(model, ffn=0.5, score="random", seed=s) for s in (0, 0, 1))
    assert first == again != other


def test_scoring_leaves_the_model_as_it_was():
    model = shaken("llama").train()
    model.model.layers[0].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    score_units(
        model, find_units(model), score="taylor", calibration=[ANATOMIES["llama"].batch(2)], seed=0
    )
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert not model.model.layers[0].training
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({}, "nothing to remove"),
        ({"ffn": 1.0}, r"`ffn` is 1.0.*\[0, 1\)"),
        ({"ffn": -0.5}, r"`ffn` is -0.5"),
        ({"ffn": 50}, r"For half pass 0.5"),
        ({"ffn": "half"}, r"`ffn` is 'half'"),
        ({"ffn": True}, r"`ffn` is True"),
        ({"ffn": 0.001}, r"leaves 64 of 64"),
        ({"ffn": 0.999}, r"leaves 0 of 64"),
        ({"ffn": 0.5, "round_to": 100}, r"multiples of 100 leaves 0 of 64"),
        ({"ffn": 0.5, "round_to": 0}, r"`round_to` is 0"),
        (
            {"heads": 0.25},
            "cannot be removed from BertForSeq.*head size.*ffn, layers",
        ),
        ({"experts": 0.5}, "experts cannot be removed.*What can be: ffn, layers"),
        ({"layers": 0}, "`layers` is 0: .*keep 1 to 2"),
        ({"layers": 3}, "keep 1 to 2"),
        ({"layers": -1}, "keep 1 to 2"),
        ({"layers": True}, "how many to keep"),
        ({"layers": 1.5}, "how many to keep"),
        ({"layers": [1, 0]}, "rising numbers from 0 to 1"),
        ({"layers": []}, "at least one"),
        ({"layers": [2]}, "rising numbers from 0 to 1"),
        ({"layers": {"decoder": 1}}, "`layers` names 'decoder'"),
        ({"ffn": 0.5, "score": "taylor"}, "pass `calibration=`"),
        ({"ffn": 0.5, "score": "best"}, "`score` is 'best'"),
        ({"ffn": 0.5, "score": "taylor", "calibration": []}, "empty"),
        (
            {"ffn": 0.5, "score": "taylor", "calibration": [{"input_ids": torch.ones(2, 3).long()}]},
            "carry labels",
        ),
    ],
)
def test_refusals(settings, error):
    with pytest.raises(ValueError, match=f"(?s){error}"):
        prune_structure(tiny_bert(), **({"score": "random"} | settings))


@pytest.mark.parametrize(
    ("model", "settings", "error"),
    [
        (tiny_llama, {"heads": 0.25}, "has 2 heads .*possible are 1/2"),
        (tiny_gpt2, {"heads": 0.25}, "head size"),
        (lambda: shaken("mixtral"), {"ffn": 0.5}, "experts"),
        (lambda: shaken("mixtral"), {"experts": 0.75}, "each token goes to 2"),
        (lambda: shaken("mixtral"), {"experts": 0.3}, "possible are 1/4, 2/4, 3/4"),
        (lambda: shaken("whisper"), {"heads": 0.5}, "head size"),
        (lambda: nn.Linear(2, 2), {"ffn": 0.5}, "Linear is not a transformers model"),
        (
            lambda: OPTForCausalLM(
                OPTConfig(
                    vocab_size=8, hidden_size=8, ffn_dim=8, num_hidden_layers=1, num_attention_heads=1
                )
            ),
            {"ffn": 0.5},
            "model type 'opt'.*known are.*whisper",
        ),
        (
            lambda: get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])),
            {"ffn": 0.5},
            "merge_and_unload",
        ),
    ],
)
def test_refusals_of_models(model, settings, error):
    with pytest.raises(ValueError, match=f"(?s){error}"):
        prune_structure(model(), **settings, score="magnitude")


def test_a_config_that_forbids_the_number_of_heads_is_told_before_the_model_runs():
    model = shaken("llama")
    model = type(model)(type(model.config)(**{**model.config.to_dict(), "num_key_value_heads": 4}))
    with pytest.raises(
        ValueError, match="(?s)LlamaConfig forbids.*multiple of the number of attention"
    ):
        prune_structure(model, heads=0.25, calibration=[{"input_ids": "never read"}])


def test_layers_whose_number_means_something_stay():
    model = tiny_gpt2()
    model.config.scale_attn_by_inverse_layer_idx = True
    with pytest.raises(ValueError, match="scale_attn_by_inverse_layer_idx.*What can be: ffn"):
        prune_structure(model, layers=1, score="random")


def test_packed_weights_are_refused(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantized(bits=4))
    with pytest.raises(ValueError, match="packed as torch.uint8.*without quantization"):
        prune_structure(model, ffn=0.5, score="magnitude")


def test_scores_that_are_not_finite_are_refused():
    model = shaken("bert")
    with torch.no_grad():
        model.bert.encoder.layer[0].intermediate.dense.weight[0, 0] = torch.nan
    for score in ("taylor", "activation", "magnitude"):
        with pytest.raises(ValueError, match="not finite"):
            prune_structure(model, ffn=0.5, score=score, calibration=[text(2)])
