"""Blockwise reconstruction against a plain rendering, and what it leaves as it was."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from calibrations import ARCHITECTURES, build, images, mask, text, tokens
from tiny import tiny_bert, tiny_gpt2, tiny_llama, tiny_mixtral, tiny_vit
from torch import nn

from hf_compress import prune_oneshot_, quantize_oneshot_
from hf_compress.constraint import constrain
from hf_compress.quantization.blockwise import BETAS, TRAVEL
from hf_compress.quantization.grids import fake_quantize, grouped
from hf_compress.quantization.learned import MEAN, SQUARE
from hf_compress.quantization.quantizer import SCALE_RATE, Quantizer
from hf_compress.quantization.schemes import Scheme, fit
from hf_compress.targets import find_targets

STEPS = 6


def blockwise_(model, batches=None, *, bits=4, steps=STEPS, **settings):
    batches = [text()] if batches is None else batches
    return quantize_oneshot_(model, batches, bits=bits, method="blockwise", steps=steps, **settings)


def groups_of(target, group_size=None):
    return grouped(target.param.detach(), input_dim=target.input_dim, group_size=group_size)


def on_grid(model, grids, group_size=None):
    targets = find_targets(model).targets
    return all(
        fake_quantize(groups_of(target, group_size), grids[name]).equal(groups_of(target, group_size))
        for name, target in targets.items()
        if name in grids
    )


def decoder_batches():
    return [{"input_ids": tokens(seed, 3), "attention_mask": mask(seed + 9, 3)} for seed in (1, 2, 3)]


def plain(layer, calls, answers, masks, bits, group_size, steps=STEPS):
    """One block by autograd alone: the straight-through estimator and learned steps as expressions."""
    names = [name for name, module in layer.named_modules() if isinstance(module, nn.Linear)]
    latent = {
        n: layer.get_submodule(n).weight.detach().clone().unflatten(1, (-1, group_size)) for n in names
    }
    scale = {
        n: fit(latent[n], Scheme(bits=bits, group_size=group_size)).scale.unsqueeze(-1) for n in names
    }
    size = {n: scale[n].abs().mean() for n in names}
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    first = {n: torch.zeros_like(latent[n]) for n in names}
    second = {n: torch.zeros_like(latent[n]) for n in names}
    mean = {n: torch.zeros_like(scale[n]) for n in names}
    square = {n: torch.zeros_like(scale[n]) for n in names}
    generator = torch.Generator().manual_seed(0)
    order = sum((torch.randperm(len(calls), generator=generator).tolist() for _ in range(steps)), [])
    for step, index in enumerate(order[:steps], 1):
        s = {n: scale[n].clone().requires_grad_() for n in names}
        weights = {}
        for n in names:
            # As the package divides: a weight may lie exactly on the last code, where the slope jumps.
            inside = (latent[n] * (1 / s[n])).clamp(low, high)
            weights[f"{n}.weight"] = ((inside + (inside.round() - inside).detach()) * s[n]).flatten(1)
            weights[f"{n}.weight"].retain_grad()
        args, kwargs = calls[index]
        answer = torch.func.functional_call(layer, weights, args, kwargs)
        error = (answer - answers[index])[masks[index]].square().sum(-1)
        whole = answers[index][masks[index]].square().sum(-1)
        ((error / whole).mean() + error.sum() / whole.sum()).backward()
        left = 1 - (step - 1) / steps
        for n in names:
            by_log = s[n].grad * scale[n]
            mean[n] = MEAN * mean[n] + (1 - MEAN) * by_log
            square[n] = SQUARE * square[n] + (1 - SQUARE) * by_log**2
            # The scales are told the step that is coming, and are at rest in the last.
            scale[n] = scale[n] * torch.exp(
                -SCALE_RATE / high * (1 - step / steps) * mean[n] / square[n].sqrt()
            )
            codes = (latent[n] * (1 / scale[n])).round()
            grad = (
                weights[f"{n}.weight"]
                .grad.view_as(codes)
                .masked_fill((codes < low) | (codes > high), 0)
            )
            first[n] = BETAS[0] * first[n] + (1 - BETAS[0]) * grad
            second[n] = BETAS[1] * second[n] + (1 - BETAS[1]) * grad**2
            unbiased = first[n] / (1 - BETAS[0] ** step), second[n] / (1 - BETAS[1] ** step)
            moved = unbiased[0] / (unbiased[1].sqrt() + 1e-20)
            latent[n] = latent[n] - 2 * TRAVEL / steps * size[n] * left * moved
    return {n: ((latent[n] / scale[n]).round().clamp(low, high) * scale[n]).flatten(1) for n in names}


def seen_by(module, model, batches):
    calls = []
    hook = module.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    with torch.no_grad():
        for batch in batches:
            model(**batch, use_cache=False)
    hook.remove()
    return calls


def test_equals_a_plain_training_of_each_block():
    batches = decoder_batches()
    dense = tiny_llama().eval()
    found, naive = copy.deepcopy(dense), copy.deepcopy(dense)
    grids = blockwise_(found, batches, bits=3, group_size=16)
    masks = [batch["attention_mask"].bool() for batch in batches]
    for index in range(2):
        taught = seen_by(dense.model.layers[index], dense, batches)
        with torch.no_grad():
            answers = [dense.model.layers[index](*args, **kwargs) for args, kwargs in taught]
        layer = naive.model.layers[index]
        wanted = plain(layer, seen_by(layer, naive, batches), answers, masks, 3, 16)
        for name, weight in wanted.items():
            key = f"model.layers.{index}.{name}.weight"
            layer.get_submodule(name).weight.data.copy_(weight)
            torch.testing.assert_close(found.get_parameter(key), weight, rtol=1e-3, atol=1e-4)
            nearest = fit(
                dense.get_parameter(key).unflatten(1, (-1, 16)), Scheme(bits=3, group_size=16)
            )
            assert not grids[key].scale.equal(nearest.scale)
    assert on_grid(found, grids, 16)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_weight_lies_on_its_grid_and_nothing_else_changes(name):
    model, batch = build(name)
    dense = copy.deepcopy(model)
    grids = blockwise_(model, [batch], group_size=16)
    targets = find_targets(model).targets
    assert set(grids) == set(targets)
    assert on_grid(model, grids, 16)
    for key, tensor in model.state_dict().items():
        assert tensor.equal(dense.state_dict()[key]) is (key not in targets), key


def test_only_what_is_named_in_a_model_left_as_it_was_found():
    model = tiny_llama().train()
    model.model.layers[1].eval()
    model.model.layers[0].mlp.up_proj.weight.grad = torch.ones(64, 32)
    before = [
        {n: module.training for n, module in model.named_modules()},
        {n: (p.data_ptr(), p.requires_grad, id(p.grad)) for n, p in model.named_parameters()},
    ]
    grids = blockwise_(model, targets="q_proj", ignore="layers.0")
    assert list(grids) == ["model.layers.1.self_attn.q_proj.weight"]
    assert before == [
        {n: module.training for n, module in model.named_modules()},
        {n: (p.data_ptr(), p.requires_grad, id(p.grad)) for n, p in model.named_parameters()},
    ]
    assert not any(module._forward_pre_hooks for module in model.modules())


class Blocks(nn.Module):
    """Residual blocks of two layers, whose inputs are correlated and of different sizes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.mix = torch.randn(48, 48) * torch.logspace(-1, 1, 48)
        layers = [nn.Sequential(nn.Linear(48, 96), nn.GELU(), nn.Linear(96, 48)) for _ in range(3)]
        self.blocks = nn.ModuleList(layers)

    def forward(self, x):
        x = x @ self.mix
        for block in self.blocks:
            x = x + block(x)
        return x


@pytest.mark.parametrize(("bits", "at_most"), [(8, 0.95), (4, 0.85), (2, 0.75)])
def test_loses_less_than_rounding_to_nearest(bits, at_most):
    dense = Blocks()
    rows, held_out = torch.randn(1024, 48).split(512)
    batches, lost = [{"x": part} for part in rows.split(64)], {}
    for method in ("rtn", "blockwise"):
        model = copy.deepcopy(dense)
        calibration = batches if method == "blockwise" else None
        quantize_oneshot_(model, calibration, bits=bits, group_size=16, method=method, steps=60)
        with torch.no_grad():
            lost[method] = (model(held_out) - dense(held_out)).norm().item()
    assert lost["blockwise"] < at_most * lost["rtn"]


def test_learns_under_autocast_too():
    """Which keeps casts of the weights, of the dense ones without gradients."""
    dense, one, other = (tiny_llama() for _ in range(3))
    grids = blockwise_(one, decoder_batches(), group_size=16)
    with torch.autocast("cpu", torch.bfloat16):
        found = blockwise_(other, decoder_batches(), group_size=16)
        assert torch.is_autocast_cache_enabled()
    assert on_grid(other, found, 16)
    scheme = Scheme(bits=4, group_size=16)
    for key, target in find_targets(dense).targets.items():
        groups = groups_of(target, 16)
        nearest = fit(groups, scheme)
        moved = (grids[key].scale / nearest.scale).log()
        moved_by_casts = (found[key].scale / nearest.scale).log()
        assert torch.corrcoef(torch.stack([moved.flatten(), moved_by_casts.flatten()]))[0, 1] > 0.5, key
        rounded = groups_of(find_targets(other).targets[key], 16)
        assert not rounded.equal(fake_quantize(groups, nearest))


def test_the_same_again_and_as_it_is_cut_for_the_threads():
    one, other = tiny_gpt2(), tiny_gpt2()
    blockwise_(one, decoder_batches())
    torch.rand(3)  # the order of the batches is its own
    blockwise_(other, decoder_batches())
    assert all(tensor.equal(other.state_dict()[key]) for key, tensor in one.state_dict().items())


def test_what_is_pruned_stays_pruned():
    model = tiny_bert()
    prune_oneshot_(model, [text()], sparsity=0.5)
    sparse = copy.deepcopy(model)
    blockwise_(model)
    for key, target in find_targets(sparse).targets.items():
        assert model.get_parameter(key)[target.param == 0].eq(0).all(), key
        assert 0.5 <= (model.get_parameter(key) == 0).float().mean() < 0.75


def test_padding_does_not_count():
    batch = text()
    other = batch | {"input_ids": torch.where(batch["attention_mask"].bool(), batch["input_ids"], 7)}
    one, two = tiny_llama(), tiny_llama()
    blockwise_(one, [batch])
    blockwise_(two, [other])
    for key, target in find_targets(one).targets.items():
        torch.testing.assert_close(target.param, two.get_parameter(key), rtol=1e-4, atol=1e-5)


def test_experts_that_are_not_reached_are_rounded_to_nearest():
    model = tiny_mixtral(layers=1, experts=16)
    before = find_targets(copy.deepcopy(model)).targets
    grids = blockwise_(model, [{"input_ids": tokens(rows=1)[:, :2]}], group_size=8)
    assert on_grid(model, grids, 8)
    key = "model.layers.0.mlp.experts.down_proj"
    scheme = Scheme(bits=4, group_size=8)
    nearest = fake_quantize(groups_of(before[key], 8), fit(groups_of(before[key], 8), scheme))
    groups = groups_of(find_targets(model).targets[key], 8)
    same = [one.equal(other) for one, other in zip(groups, nearest, strict=True)]
    assert 8 <= same.count(True) < 16  # two positions choose two each


def test_a_training_goes_on_from_exactly_there():
    model = tiny_bert()
    grids = blockwise_(model, group_size=16)
    selection = find_targets(model)
    before = {key: param.detach().clone() for key, param in selection.parameters.items()}
    quantizer = Quantizer(4, group_size=16, grids=grids, targets=selection.targets)
    quantizer.at(0, 10)
    constrain(torch.optim.SGD(model.parameters(), lr=0.1), selection.parameters, quantizer)
    assert all(param.equal(before[key]) for key, param in selection.parameters.items())


REFUSED = [
    (lambda: tiny_llama().to(torch.bfloat16), {}, "is torch.bfloat16, too coarse.*dtype=torch.float32"),
    (lambda: cpu_offload(tiny_llama(), "cpu"), {}, "is offloaded, and 'blockwise' trains it"),
    (tiny_llama, {"steps": 0}, "`steps` is 0: pass how many"),
    (tiny_llama, {"steps": 1.5}, "`steps` is 1.5: pass how many"),
    (tiny_llama, {"batches": []}, "`calibration` is empty"),
]


@pytest.mark.parametrize(("make", "settings", "message"), REFUSED)
def test_refused_before_anything_is_changed(make, settings, message):
    model = make()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        blockwise_(model, **settings)
    assert all(p.is_meta or p.equal(before[name]) for name, p in model.state_dict().items())


def test_answers_that_are_not_finite_are_told():
    batch = images()
    batch["pixel_values"][0] = torch.inf
    with pytest.raises(ValueError, match="answers that are NaN or infinite"):
        blockwise_(tiny_vit(), [batch])
