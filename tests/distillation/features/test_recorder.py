"""What is taken down is what transformers gives out by its own means; and nothing stays behind."""

import copy

import pytest
import torch
from distillation.features.pairs import MODELS, make
from tiny import tiny_llama

from hf_compress.distillation.features.attention import scores
from hf_compress.distillation.features.recorder import Feature, Recorder
from hf_compress.distillation.stacks import find_stacks


def record(model, batch, features):
    recorder = Recorder(model, features)
    recorder.start()
    output = model(**batch)
    values = recorder.take(learns=True)
    recorder.remove()
    return values, output


def outputs(model, batch):
    """(hidden states, attentions) of each stack by transformers' own means."""
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    given = model(**batch, output_hidden_states=True, output_attentions=True)
    if "encoder_hidden_states" not in given:
        return {"layers": (given.hidden_states, given.attentions)}
    return {
        side: (given[f"{side}_hidden_states"], given[f"{side}_attentions"])
        for side in ("encoder", "decoder")
    }


@pytest.mark.parametrize("name", MODELS)
def test_hidden_states_and_embeddings(name):
    model, _, batch = make(name, student=3)
    for stack, (hidden, _) in outputs(model, batch).items():
        wanted = [Feature("embeddings", stack), *(Feature("hidden", stack, i) for i in range(3))]
        values, _ = record(model, batch, wanted)
        assert len(hidden) == 4
        # ViT's own last hidden state is the one before its final norm; here it is that after it.
        for feature, expected in zip(wanted[:3], hidden, strict=False):
            torch.testing.assert_close(values[feature], expected, rtol=1e-4, atol=1e-4)
        last = values[wanted[3]]
        if name == "vit":
            torch.testing.assert_close(last, model.vit(**batch).last_hidden_state)
        else:
            torch.testing.assert_close(last, hidden[3], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_maps_of_attention(name, implementation):
    model, _, batch = make(name)
    model.set_attn_implementation(implementation)
    for stack, (_, attentions) in outputs(model, batch).items():
        assert len(attentions) == 2
        wanted = [Feature("attention", stack, layer) for layer in range(2)]
        values, _ = record(model, batch, wanted)
        for feature, expected in zip(wanted, attentions, strict=True):
            logits, seen = scores(values[feature])
            maps = logits.masked_fill(~seen, float("-inf")).softmax(-1)
            real = expected.sum(-1) > 0.5
            torch.testing.assert_close(maps[real], expected[real], rtol=1e-4, atol=1e-5)


def test_the_maps_are_those_before_dropout():
    model = tiny_llama(attention_dropout=0.5).train()
    ids = torch.randint(5, 90, (2, 6))
    feature = Feature("attention", "layers", 0)
    values, _ = record(model, {"input_ids": ids}, [feature])
    undropped, _ = record(model.eval(), {"input_ids": ids}, [feature])
    for ours, theirs in zip(scores(values[feature]), scores(undropped[feature]), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_being_watched_changes_nothing_and_leaves_nothing(name, implementation, tmp_path):
    model, _, batch = make(name)
    model.set_attn_implementation(implementation)
    expected = model(**batch)
    before = [dict(vars(module)) for module in model.modules()]
    keys, config = list(model.state_dict()), model.config.to_dict()
    stacks = find_stacks(model)
    recorder = Recorder(
        model,
        [
            *(Feature(kind, stack, 1) for kind in ("hidden", "attention") for stack in stacks),
            *(Feature("embeddings", stack) for stack in stacks),
            Feature("module", next(iter(stacks.values())).path + ".0"),
        ],
    )
    recorder.start()
    assert torch.equal(model(**batch).logits, expected.logits)
    recorder.take(learns=True)
    assert list(model.state_dict()) == keys
    model.save_pretrained(tmp_path)
    assert type(model.config).from_pretrained(tmp_path).to_dict() == {
        **config,
        "architectures": [type(model).__name__],
        **{name: model.config.to_dict()[name] for name in ("dtype", "transformers_version")},
    }
    recorder.remove()
    for module, attributes in zip(model.modules(), before, strict=True):
        assert vars(module).keys() == attributes.keys()
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert model.config._attn_implementation == implementation


def test_a_decoders_own_attention_is_taken_not_the_cross_attention():
    model, _, batch = make("t5")
    feature = Feature("attention", "decoder", 1)
    values, _ = record(model, batch, [feature])
    assert values[feature].query.shape[2] == values[feature].key.shape[2] == batch["labels"].shape[1]


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_generation_goes_on_while_attention_is_watched(name):
    """As it does in an evaluation between two steps."""
    model, _, batch = make(name)
    ids = {"input_ids": batch["input_ids"][:1], "max_new_tokens": 6, "do_sample": False}
    expected = model.generate(**ids)
    stack = list(find_stacks(model))[-1]
    recorder = Recorder(model, [Feature("attention", stack, 1)])
    assert torch.equal(model.generate(**ids), expected)
    recorder.remove()


def test_forwards_outside_of_start_and_take_are_not_taken_down():
    model, _, batch = make("bert")
    feature = Feature("hidden", "layers", 0)
    recorder = Recorder(model, [feature])
    recorder.start()
    model(**batch)
    first = recorder.take(learns=True)[feature]
    model(**batch)
    recorder.start()
    with pytest.raises(ValueError, match="without its hidden of layers, layer 0"):
        recorder.take(learns=True)
    assert first.shape == (3, 7, 32)


def test_attention_that_cannot_be_seen_is_refused():
    model, _, _ = make("bert")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(
        ValueError, match="attn_implementation='flash_attention_2', which never has maps"
    ):
        Recorder(model, [Feature("attention", "layers", 0)])


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("kind", ["hidden", "attention"])
def test_reentrant_checkpointing_that_cuts_the_gradient_off_is_refused(kind):
    model, _, batch = make("llama")
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    feature = Feature(kind, "layers", 0)
    recorder = Recorder(model, [feature])
    recorder.start()
    model(**batch)
    if kind == "hidden":  # seen from outside of what is repeated
        assert recorder.take(learns=True)[feature].requires_grad
    else:
        with pytest.raises(ValueError, match="Give it use_reentrant=False"):
            recorder.take(learns=True)
