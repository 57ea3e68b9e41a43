"""Hidden features that are gone: what the norms that read them then give, and where they cannot go."""

import copy

import pytest
import torch
from anatomies import ANATOMIES, shaken
from tiny import tiny_llama, tiny_llama_classifier
from transformers import (
    LlamaModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    T5ForQuestionAnswering,
    T5ForSequenceClassification,
    T5Model,
)

from hf_compress.pruning.structure.budget import fit_structure
from hf_compress.pruning.structure.pruner import UnitPruner
from hf_compress.pruning.structure.removal import prune_structure, remove_units, zero_units_
from hf_compress.pruning.structure.scores import score_units
from hf_compress.pruning.structure.units import find_units

WITH = [name for name, row in ANATOMIES.items() if row.feature]
WITHOUT = [name for name, row in ANATOMIES.items() if not row.feature]
KEPT = [n for n in range(32) if n % 4 != 1]  # 24 of them


def hidden(model):
    (units,) = find_units(model, ["hidden"])
    return units


def norms(model):
    """Those of all 32 features, and not those within heads."""
    return {
        name: module
        for name, module in model.named_modules()
        if type(module).__name__.endswith(("RMSNorm", "T5LayerNorm")) and len(module.weight) == 32
    }


@torch.no_grad()
def output(model, batch):
    return model(**{key: value for key, value in batch.items() if key != "labels"})[0]


@pytest.mark.parametrize("name", WITH)
def test_the_smaller_model_is_the_larger_one_with_zeros_in_the_stream(name):
    model, batch = shaken(name), ANATOMIES[name].batch()
    smaller = remove_units(model, {hidden(model).name: KEPT})
    stays = torch.zeros(32).index_fill(0, torch.tensor(KEPT), 1.0)
    for norm in norms(model).values():  # which alone read it
        norm.register_forward_pre_hook(lambda module, args: args[0] * stays)
    with torch.no_grad():
        found, expected = smaller(**batch).logits, model(**batch).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("name", WITH)
def test_as_many_weights_go_as_counted_by_hand(name):
    model = shaken(name)
    smaller = prune_structure(model, hidden=0.25, score="random")
    assert smaller.config.hidden_size == 24
    assert model.num_parameters() - smaller.num_parameters() == 8 * ANATOMIES[name].feature


def tied_qwen2():
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=96,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=64,
            tie_word_embeddings=True,
        )
    )


def t5(kind, **settings):
    """With tie_word_embeddings=False as T5 1.1 has it: then the head divides by nothing."""
    return kind(
        T5Config(
            vocab_size=96,
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
            eos_token_id=7,
            num_labels=2,
            **settings,
        )
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda: tiny_llama(attention_bias=True, mlp_bias=True),
        lambda: tiny_llama(LlamaModel),
        tiny_llama_classifier,
        tied_qwen2,
        lambda: t5(T5ForConditionalGeneration, tie_word_embeddings=False),
        lambda: t5(T5Model),
        lambda: t5(T5EncoderModel),
        lambda: t5(T5ForQuestionAnswering),
        lambda: t5(T5ForSequenceClassification),
    ],
    ids=["biases", "base", "scores", "tied", "t5v1.1", "t5 base", "encoder", "qa", "t5 classes"],
)
@pytest.mark.parametrize("epsilon", [1e-6, 0.5])
def test_with_any_head_and_any_epsilon(make, epsilon):
    torch.manual_seed(0)
    model = make().eval()
    batch = {"input_ids": torch.randint(8, 96, (4, 6))}
    batch["input_ids"][:, -1] = 7
    if isinstance(model, (T5Model, T5ForConditionalGeneration)):
        batch["decoder_input_ids"] = batch["input_ids"]
    field = "rms_norm_eps" if "rms_norm_eps" in model.config.to_dict() else "layer_norm_epsilon"
    setattr(model.config, field, epsilon)
    with torch.no_grad():
        for norm in norms(model).values():
            norm.variance_epsilon = epsilon
            norm.weight.uniform_(0.5, 2.0)
    kept = {hidden(model).name: KEPT}
    smaller = remove_units(model, kept)
    assert getattr(smaller.config, field) == pytest.approx(epsilon * 32 / 24)
    zeroed = copy.deepcopy(model)
    zero_units_(zeroed, kept)
    found, expected = output(smaller, batch), output(zeroed, batch)
    if found.shape[-1] == 24:
        assert not expected[..., 1].any()
        expected = expected[..., KEPT]
    assert not expected.allclose(torch.zeros(()), atol=1e-3)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_where_the_head_divides_by_the_root_of_the_size_the_last_norm_stays():
    model = shaken("t5")
    kept = {hidden(model).name: KEPT}
    smaller = remove_units(model, kept)
    grown = {
        name: (smaller.get_submodule(name).weight / norm.weight[KEPT]).mean().item()
        for name, norm in norms(model).items()
    }
    assert grown.pop("decoder.final_layer_norm") == 1.0
    assert grown == pytest.approx(dict.fromkeys(grown, (32 / 24) ** 0.5))


def test_the_config_of_what_is_left():
    model = tied_qwen2()
    assert "head_dim" not in model.config.to_dict()
    smaller = prune_structure(model.bfloat16(), hidden=0.25, score="magnitude")
    assert (smaller.config.hidden_size, smaller.config.head_dim) == (24, 8)
    assert model.config.hidden_size == 32
    assert {p.dtype for p in smaller.parameters()} == {torch.bfloat16}
    assert smaller.lm_head.weight is smaller.model.embed_tokens.weight


def test_twice_is_as_well_as_once():
    model = shaken("qwen3")
    name = hidden(model).name
    once = remove_units(model, {name: KEPT[:12]})
    twice = remove_units(remove_units(model, {name: KEPT}), {name: list(range(12))})
    assert twice.config.rms_norm_eps == pytest.approx(once.config.rms_norm_eps)
    for key, value in once.state_dict().items():
        torch.testing.assert_close(twice.state_dict()[key], value)


def test_activation_is_what_norms_give_and_padding_does_not_count():
    """The encoder's norms see other tokens than the decoder's."""
    model, batch = shaken("t5"), ANATOMIES["t5"].batch(6)
    expected = torch.zeros(32)
    masks = {"encoder": batch["attention_mask"], "decoder": batch["labels"] != -100}

    def add(name):
        def hook(module, args, given):
            tokens = given[masks[name.split(".")[0]].bool()]
            expected.add_(tokens.detach().abs().sum(0))

        return hook

    handles = [norm.register_forward_hook(add(name)) for name, norm in norms(model).items()]
    output(model, batch | {"decoder_input_ids": model._shift_right(batch["labels"])})
    for handle in handles:
        handle.remove()
    units = hidden(model)
    found = score_units(model, [units], score="activation", calibration=[batch], seed=0)[units.name]
    torch.testing.assert_close(found.float(), expected, rtol=1e-4, atol=1e-4)


def test_the_multiples():
    """Of heads too in Llama, by a rule of its config."""
    sizes = [
        prune_structure(shaken("qwen2"), hidden=0.3, round_to=n, score="random").config.hidden_size
        for n in (1, 8)
    ]
    assert sizes == [22, 24]
    with pytest.raises(ValueError, match="(?s)LlamaConfig forbids.*multiple.*another `round_to`"):
        prune_structure(tiny_llama(), hidden=0.3, score="random")
    smaller = prune_structure(tiny_llama(), hidden=0.3, round_to=4, score="random")
    assert smaller.config.hidden_size == 24


def test_looking_at_the_features_draws_no_random_numbers():
    model = tiny_llama()
    before = torch.random.get_rng_state()
    hidden(model)
    assert torch.random.get_rng_state().equal(before)


@pytest.mark.parametrize("name", WITHOUT)
def test_where_a_mean_is_subtracted_they_stay(name):
    with pytest.raises(
        ValueError, match="(?s)hidden cannot be removed.*LayerNorms subtract.*What can be: ffn,"
    ):
        prune_structure(shaken(name), hidden=0.5, score="random")


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"hidden": 1.0}, r"`hidden` is 1.0.*\[0, 1\)"),
        ({"hidden": 0.01}, "`hidden` of 0.01 .*leaves 32 of 32 features in model.embed_tokens"),
        ({"hidden": 0.5, "round_to": 100}, "multiples of 100 leaves 0 of 32"),
        ({"hidden": 0.5, "score": "activation"}, "pass `calibration=`"),
    ],
)
def test_refusals(settings, error):
    with pytest.raises(ValueError, match=f"(?s){error}"):
        prune_structure(shaken("qwen2"), **({"score": "random"} | settings))


def test_they_do_not_go_along_a_schedule():
    with pytest.raises(ValueError, match="hidden cannot be zeroed along a schedule"):
        UnitPruner(find_units(tiny_llama(), ["hidden"]), 0.5)


def test_a_budget_passes_by_what_parts_may_be_alone_but_not_together():
    """Of 6 heads 4 can stay and of 48 features 42, but 42 is no multiple of 4."""
    torch.manual_seed(0)
    config = copy.deepcopy(tiny_llama().config)
    config.hidden_size, config.num_attention_heads, config.num_key_value_heads = 48, 6, 3
    model = type(tiny_llama())(config).eval()
    batch = ANATOMIES["llama"].batch()
    with torch.no_grad():
        for layer in model.model.layers:  # a third of the heads does nothing
            layer.self_attn.o_proj.weight[:, 32:].zero_()
        model.lm_head.weight.mul_(10)  # sure of what it says, and right: what else goes is a loss
        batch["labels"][:, 1:] = model(**batch).logits.argmax(-1)[:, :-1]
    limit = int(0.82 * 4 * model.num_parameters())
    fitted = fit_structure(model, [batch], max_bytes=limit, kinds=["heads", "hidden"])
    assert fitted.bytes[1] <= limit
    assert fitted.settings == {"heads": pytest.approx(2 / 3)}
