import copy
import dataclasses
import json

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from accelerate.hooks import remove_hook_from_submodules
from calibrations import ARCHITECTURES, ROWS, build, mask, text, tokens
from tiny import (
    VOCABULARY,
    classification_rows,
    tiny_bert,
    tiny_gpt_oss,
    tiny_llama,
    tiny_mixtral,
)
from torch import nn
from transformers import AlbertConfig, AlbertForMaskedLM, DefaultDataCollator

from hf_compress import DistillationArguments, DistillationTrainer, PruningCallback
from hf_compress.pruning.allocate import owl
from hf_compress.pruning.oneshot.prune import prune_oneshot_
from hf_compress.pruning.oneshot.wanda import wanda_mask
from hf_compress.pruning.outliers import outlier_ratios
from hf_compress.targets import find_targets

every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


def cut(batch, size):
    return [{key: value[i : i + size] for key, value in batch.items()} for i in range(0, ROWS, size)]


def zeros(param):
    return int((param == 0).sum())


def as_matrix(target):
    """A view (out, in) of a weight."""
    return target.param.data.t() if target.input_dim == 0 else target.param.data


@every_architecture
@pytest.mark.parametrize("score", ["sparsegpt", "wanda", "magnitude"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_prunes_what_was_asked_and_nothing_else(name, score, pattern):
    model, batch = build(name)
    before = copy.deepcopy(model.state_dict())
    sparsity = 0.3 if pattern == "unstructured" else None
    report = prune_oneshot_(model, cut(batch, 5), sparsity=sparsity, score=score, pattern=pattern)
    selection = find_targets(model)
    assert set(report.weights) == set(selection.targets)
    assert report.skipped == selection.skipped
    for target in selection.targets.values():
        matrix = as_matrix(target)
        if pattern == "2:4":
            assert (matrix.reshape(-1, 4) == 0).sum(1).eq(2).all(), target.name
        elif score == "wanda":
            assert (matrix == 0).sum(1).eq(round(0.3 * matrix.shape[1])).all(), target.name
        else:
            assert zeros(matrix) == round(0.3 * matrix.numel()), target.name
        found = report.weights[target.name]
        assert (found.size, found.zeros) == (matrix.numel(), zeros(matrix))
        assert 0 < found.error < 1
        kept = matrix != 0
        if score != "sparsegpt":
            old = before[target.name].t() if target.input_dim == 0 else before[target.name]
            assert matrix[kept].equal(old[kept])
    for key, tensor in model.state_dict().items():
        if key not in selection.targets:
            assert tensor.equal(before[key]), key
    json.dumps(dataclasses.asdict(report))


@pytest.mark.parametrize("score", ["sparsegpt", "wanda", "magnitude"])
def test_each_target_may_have_a_sparsity_of_its_own(score):
    model, batch = build("llama")
    same = copy.deepcopy(model)
    asked = {"down_proj": 0.25, "re:self_attn": 0.5, "Linear": 0.75}
    prune_oneshot_(model, cut(batch, ROWS), sparsity=asked, score=score)
    for name, target in find_targets(model).targets.items():
        fraction = 0.25 if "down_proj" in name else 0.5 if "self_attn" in name else 0.75
        assert zeros(target.param) == fraction * target.param.numel(), name
    # What comes first sees the same inputs as in a model that is pruned to that sparsity everywhere.
    prune_oneshot_(same, cut(batch, ROWS), sparsity=0.5, score=score)
    first = "model.layers.0.self_attn.q_proj.weight"
    assert model.get_parameter(first).equal(same.get_parameter(first))


def test_allocations_are_taken():
    model, batch = build("llama")
    weights = find_targets(model).parameters
    fractions = owl(weights, 0.6, outlier_ratios(model, [batch], threshold=2.0), spread=0.2)
    assert len({*fractions.values()}) > 1
    report = prune_oneshot_(model, cut(batch, ROWS), sparsity=fractions)
    assert report.sparsity == pytest.approx(0.6, abs=1e-4)
    for name, weight in report.weights.items():
        assert weight.zeros == round(fractions[name] * weight.size)


class Reached(Exception):
    pass


def inputs_of(model, batch, layer):
    """What goes into a layer when the whole model runs up to it."""

    def stop(module, args):
        raise Reached(args[0])

    hook = layer.register_forward_pre_hook(stop)
    with pytest.raises(Reached) as reached, torch.no_grad():
        model(**batch)
    hook.remove()
    return reached.value.args[0]


def order_of_calls(model, batch, names):
    called = []
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: called.append(name))
        for name in names
    ]
    with torch.no_grad():
        model(**batch)
    for hook in hooks:
        hook.remove()
    return called


@every_architecture
def test_each_layer_sees_the_layers_before_it_pruned(name):
    """The definition: for each layer in turn the whole model runs up to it."""
    model, batch = build(name)
    naive = copy.deepcopy(model).eval()
    targets = {n.rpartition(".")[0]: t for n, t in find_targets(naive).targets.items()}
    called = order_of_calls(naive, batch, targets)
    assert sorted(called) == sorted(targets)
    for layer in called:
        inputs = inputs_of(naive, batch, naive.get_submodule(layer))
        decoder = layer.startswith(("decoder", "model.decoder"))
        crossed = "EncDecAttention.k" in layer or "EncDecAttention.v" in layer
        padding = batch.get("decoder_attention_mask" if decoder and not crossed else "attention_mask")
        if padding is not None and inputs.shape[:-1] == padding.shape:
            inputs = inputs[padding.bool()]
        norms = inputs.reshape(-1, inputs.shape[-1]).norm(dim=0)
        matrix = as_matrix(targets[layer])
        matrix.mul_(wanda_mask(matrix, norms, sparsity=0.5))
    prune_oneshot_(model, cut(batch, ROWS), sparsity=0.5, score="wanda")
    for key, tensor in naive.state_dict().items():
        assert model.state_dict()[key].equal(tensor), key


@every_architecture
@pytest.mark.parametrize("score", ["sparsegpt", "wanda"])
def test_the_cut_into_batches_does_not_matter(name, score):
    model, batch = build(name)
    other = copy.deepcopy(model)
    prune_oneshot_(model, cut(batch, ROWS), sparsity=0.5, score=score)
    prune_oneshot_(other, reversed(cut(batch, 1)), sparsity=0.5, score=score)
    for key, tensor in model.state_dict().items():
        found = other.state_dict()[key]
        assert found.eq(0).equal(tensor.eq(0)), key
        torch.testing.assert_close(found, tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5"])
@pytest.mark.parametrize("score", ["sparsegpt", "wanda"])
def test_padding_does_not_count(name, score):
    model, batch = build(name)
    if name == "t5":
        batch["attention_mask"] = batch["decoder_attention_mask"] = mask()
    other = copy.deepcopy(model)
    lengths = mask().sum(1).tolist()
    rows = [{k: v[i : i + 1, :length] for k, v in batch.items()} for i, length in enumerate(lengths)]
    assert len(set(lengths)) > 3
    prune_oneshot_(model, [batch], sparsity=0.5, score=score)
    prune_oneshot_(other, rows, sparsity=0.5, score=score)
    for key, tensor in model.state_dict().items():
        assert other.state_dict()[key].eq(0).equal(tensor.eq(0)), key


@every_architecture
def test_what_is_saved_is_what_was_pruned(name, tmp_path):
    model, batch = build(name)
    prune_oneshot_(model, [batch], sparsity=0.5)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    for target in find_targets(loaded).targets.values():
        assert zeros(target.param) == target.param.numel() // 2
    with torch.no_grad():
        assert loaded(**batch).logits.equal(model.eval()(**batch).logits)


class Layer(nn.Module):
    """One linear layer, whose inputs are correlated and of different sizes."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(48, 32)
        self.mix = torch.randn(48, 48) * torch.logspace(-1, 1, 48)

    def forward(self, x):
        return self.layer(x @ self.mix)


@pytest.mark.parametrize(("sparsity", "pattern"), [(0.5, "unstructured"), (None, "2:4"), (None, "1:4")])
@torch.no_grad()
def test_the_more_a_score_knows_the_less_is_lost(sparsity, pattern):
    dense, x = Layer(), torch.randn(500, 48)
    lost, told = {}, {}
    for score in ("sparsegpt", "wanda", "magnitude"):
        model = copy.deepcopy(dense)
        report = prune_oneshot_(model, [{"x": x}], sparsity=sparsity, score=score, pattern=pattern)
        told[score] = report.weights["layer.weight"].error
        output = dense(x) - dense.layer.bias
        lost[score] = float((model(x) - dense(x)).norm() ** 2 / output.norm() ** 2)
    assert lost["sparsegpt"] < lost["wanda"] < lost["magnitude"]
    assert told["sparsegpt"] == pytest.approx(lost["sparsegpt"], rel=1e-3)


@pytest.mark.parametrize("score", ["sparsegpt", "wanda"])
def test_experts_see_the_positions_routed_to_them(score):
    model = tiny_mixtral(layers=1)
    other = copy.deepcopy(model).eval()
    ids = tokens()
    experts = other.model.layers[0].mlp.experts
    seen = []
    experts.register_forward_pre_hook(lambda module, args: seen.append(args))
    with torch.no_grad():
        other(input_ids=ids)
    hidden, routes, _ = seen[0]
    report = prune_oneshot_(
        model, [{"input_ids": ids}], sparsity=0.5, score=score, targets="MixtralExperts"
    )
    pruned = model.model.layers[0].mlp.experts
    for expert in range(4):
        first = hidden[(routes == expert).any(1)]
        gate, up = (first @ experts.gate_up_proj[expert].T).chunk(2, dim=1)
        for name, inputs in (
            ("gate_up_proj", first),
            ("down_proj", torch.nn.functional.silu(gate) * up),
        ):
            weight = experts.get_parameter(name).data[expert]
            found = pruned.get_parameter(name)[expert]
            assert zeros(found) == found.numel() // 2
            if score == "wanda":
                assert found.eq(0).equal(~wanda_mask(weight, inputs.norm(dim=0), sparsity=0.5))
            else:
                masked = weight * (found != 0)
                assert (inputs @ (found - weight).T).norm() < (inputs @ (masked - weight).T).norm()
    positions = [weight.positions for weight in report.weights.values()]
    assert positions == [2 * ids.numel()] * 2
    assert model.config._experts_implementation == other.config._experts_implementation


def test_experts_that_see_nothing_are_ranked_by_magnitude():
    model = tiny_mixtral(layers=1, experts=16)
    dense = copy.deepcopy(model)
    report = prune_oneshot_(model, [{"input_ids": tokens(rows=1)[:, :2]}], sparsity=0.5)
    assert report.sparsity == 0.5
    experts, old = (
        model.model.layers[0].mlp.experts.down_proj,
        dense.model.layers[0].mlp.experts.down_proj,
    )
    untouched = [e for e in range(16) if experts[e][experts[e] != 0].equal(old[e][experts[e] != 0])]
    assert len(untouched) >= 12
    for e in untouched:
        assert old[e][experts[e] != 0].abs().min() > old[e][experts[e] == 0].abs().max()


def test_transposed_experts_are_pruned_along_their_inputs():
    model = tiny_gpt_oss()
    prune_oneshot_(model, score="magnitude", pattern="2:4")
    experts = [t.param for t in find_targets(model).targets.values() if t.stacked]
    for param in experts:  # (experts, in, out)
        assert (param.unflatten(1, (-1, 4)) == 0).sum(2).eq(2).all()


def test_layers_that_share_weights_are_one_block():
    model = AlbertForMaskedLM(
        AlbertConfig(
            vocab_size=VOCABULARY,
            embedding_size=16,
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=32,
        )
    )
    report = prune_oneshot_(model, [text()], sparsity=0.5)
    assert report.sparsity == 0.5
    shared = next(weight for name, weight in report.weights.items() if "query" in name)
    assert shared.positions == 3 * int(mask().sum())


@pytest.mark.parametrize("offload", ["cpu", "disk"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_offloaded_weights_are_loaded_in_turn(name, offload, tmp_path):
    model, batch = build(name)
    other = copy.deepcopy(model)
    prune_oneshot_(model, [batch], sparsity=0.5)
    if offload == "cpu":
        cpu_offload(other, execution_device="cpu")
    else:
        disk_offload(other, tmp_path / "weights", execution_device="cpu")
    prune_oneshot_(other, [batch], sparsity=0.5)
    assert all(target.param.device.type == "meta" for target in find_targets(other).targets.values())
    remove_hook_from_submodules(other)  # loads all
    for key, tensor in model.state_dict().items():
        assert other.state_dict()[key].equal(tensor), key


def test_the_model_is_left_as_it_was_found():
    model = tiny_llama()
    model.train()
    model.model.layers[1].eval()
    modules = dict(model.named_modules())
    modes = {name: module.training for name, module in modules.items()}
    pointers = {name: param.data_ptr() for name, param in model.named_parameters()}
    config = model.config.to_dict()
    prune_oneshot_(model, [text()], sparsity=0.5)
    assert dict(model.named_modules()) == modules
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name: param.data_ptr() for name, param in model.named_parameters()} == pointers
    assert model.config.to_dict() == config
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("score", ["sparsegpt", "wanda"])
def test_half_precision(dtype, score):
    model = tiny_llama().to(dtype)
    report = prune_oneshot_(model, [text()], sparsity=0.5, score=score)
    assert report.sparsity == 0.5
    assert all(param.dtype == dtype for param in model.parameters())


@pytest.mark.parametrize("score", ["sparsegpt", "wanda", "magnitude"])
def test_zeros_that_are_there_count(score):
    model = tiny_llama()
    prune_oneshot_(model, [text()], sparsity=0.25, score=score)
    sparse = copy.deepcopy(model)
    prune_oneshot_(model, [text()], sparsity=0.5, score=score)
    for name, target in find_targets(model).targets.items():
        assert not (target.param != 0)[find_targets(sparse).targets[name].param == 0].any()
        assert zeros(target.param) == target.param.numel() // 2


def test_only_what_is_named():
    model = tiny_llama()
    report = prune_oneshot_(model, [text()], sparsity=0.5, targets="q_proj", ignore="layers.0")
    assert list(report.weights) == ["model.layers.1.self_attn.q_proj.weight"]
    assert zeros(model.model.layers[0].self_attn.q_proj.weight) == 0


def test_training_goes_on_at_fixed_zeros_with_the_dense_model_as_teacher(tmp_path):
    dense = tiny_bert()
    student = copy.deepcopy(dense)
    rows = classification_rows(rows=32)
    calibration = torch.utils.data.DataLoader(rows.remove_columns("labels").with_format("torch"), 8)
    prune_oneshot_(student, calibration, sparsity=0.5)
    sparse = copy.deepcopy(student)
    DistillationTrainer(
        student,
        DistillationArguments(
            str(tmp_path),
            max_steps=6,
            learning_rate=1e-2,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        ),
        teacher=dense,
        train_dataset=rows,
        data_collator=DefaultDataCollator(),
        callbacks=[PruningCallback(sparsity=0.5, end=0.0)],
    ).train()
    for name, target in find_targets(student).targets.items():
        old = find_targets(sparse).targets[name].param
        assert target.param.eq(0).equal(old.eq(0)), name
        assert not target.param.equal(old), name


@pytest.mark.parametrize("score", ["wanda", "magnitude"])
def test_each_weight_is_cast_anew_once_it_is_pruned(score):
    """Autocast keeps the cast of a weight, which would answer as before it was pruned."""
    model = tiny_llama()
    batch = {"input_ids": torch.arange(32).reshape(2, 16)}
    with torch.autocast("cpu", torch.bfloat16):
        model(**batch)
        prune_oneshot_(model, [batch], sparsity=0.5, score=score)
        within = model(**batch).logits
        assert torch.is_autocast_cache_enabled()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model(**batch).logits.equal(within)
