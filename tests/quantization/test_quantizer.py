"""The quantizer against the usual formulations, and what it must keep through a training."""

import copy
import math

import pytest
import torch
from quantization.runs import STEPS, adamw, levels, network, quantizer, train, train_on_grid, weights
from torch import nn
from torch.nn.utils import parametrize

from hf_compress.constraint import constrain
from hf_compress.pruning.pruner import Pruner
from hf_compress.quantization.grids import fake_quantize, grouped
from hf_compress.quantization.quantizer import Quantizer
from hf_compress.quantization.schemes import Scheme, fit
from hf_compress.targets import find_targets


class Absmax4(torch.autograd.Function):
    """Absmax by the book; the gradient passes where nothing is clipped."""

    @staticmethod
    def forward(ctx, weight):
        scale = weight.abs().amax(1, keepdim=True) / 7.5
        codes = (weight * (1 / scale)).round()
        ctx.save_for_backward((codes >= -8) & (codes <= 7))
        return codes.clamp(-8, 7) * scale

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0]


class StraightThrough(nn.Module):
    def forward(self, weight):
        return Absmax4.apply(weight)


def test_equals_parametrized_modules_bit_for_bit():
    ours, usual = network(), network()
    for layer in (usual[0], usual[2]):
        parametrize.register_parametrization(layer, "weight", StraightThrough())
    train_on_grid(ours, quantizer(ours, grid="absmax", end=1.0))
    train(usual, adamw(usual), [])
    for i in (0, 2):
        assert ours[i].weight.equal(usual[i].weight)


@pytest.mark.parametrize("group_size", [None, 8])
def test_equals_a_step_of_torchao(group_size):
    qat = pytest.importorskip("torchao.quantization.qat", reason="torchao is not installed")
    from torchao.quantization import quantize_

    ours, theirs = network(), network()
    config = qat.IntxFakeQuantizeConfig(
        torch.int4, "per_group" if group_size else "per_channel", group_size=group_size
    )
    quantize_(theirs, qat.QATConfig(weight_config=config, step="prepare"))
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
    made = quantizer(ours, grid="absmax", group_size=group_size, end=1.0)
    constrain(optimizer, weights(ours), made)
    x = torch.randn(8, 16)
    assert ours(x).equal(theirs(x))
    train(ours, optimizer, [made], last=1)
    train(theirs, torch.optim.SGD(theirs.parameters(), lr=0.1), [], last=1)
    for i in (0, 2):
        # Theirs multiplies the gradient by the scale and its inverse, which is 1 but for rounding.
        latent = optimizer.state[ours[i].weight]["hf_compress_latent"]
        torch.testing.assert_close(latent, theirs[i].weight, rtol=1e-6, atol=1e-7)
        assert ours[i].bias.equal(theirs[i].bias)


@pytest.mark.parametrize(
    "settings",
    [
        {"grid": "mse"},
        {"grid": "auto", "symmetric": False},
        {"grid": "median", "symmetric": False, "group_size": 8},
        {"grid": "minmax", "group_size": "tensor"},
        {"grid": "percentile", "bits": 8},
    ],
)
def test_every_step_shows_the_grid_of_the_latent_weights(settings):
    net, seen = network(), []
    made = quantizer(net, **settings, end=1.0, interval=1)
    optimizer = adamw(net)
    constrain(optimizer, weights(net), made)
    scheme = Scheme(**({"bits": 4} | settings))
    for step in range(10):
        train(net, optimizer, [made], step, step + 1)
        for weight in weights(net).values():
            latent = optimizer.state[weight]["hf_compress_latent"]
            groups = grouped(latent, input_dim=1, group_size=scheme.group_size)
            expected = fake_quantize(groups, fit(groups, scheme))
            assert grouped(weight.detach(), input_dim=1, group_size=scheme.group_size).equal(expected)
            seen.append(weight.detach().clone())
    assert not seen[0].equal(seen[-2])


def test_the_interval_holds_the_scale_between_fits():
    net = network()
    made = quantizer(net, interval=7, end=30)
    optimizer = adamw(net)
    constrain(optimizer, weights(net), made)
    scales = [made.grids["0.weight"].scale.clone()]
    for step in range(STEPS):
        train(net, optimizer, [made], step, step + 1)
        scales.append(made.grids["0.weight"].scale.clone())
        assert optimizer.state[net[0].weight]["hf_compress_scale"].equal(scales[-1])
        assert made.finished == (step + 1 >= 30)
    changed = [i for i in range(1, STEPS + 1) if not scales[i].equal(scales[i - 1])]
    assert changed == [7, 14, 21, 28, 30]


def test_bits_fall_on_schedule_after_a_delayed_start():
    net = network()
    made = quantizer(net, (8, 6, 4), start=4, end=20, grid="minmax")
    optimizer = adamw(net)
    constrain(optimizer, weights(net), made)
    assert made.width is None
    widths = []
    for step in range(STEPS):
        train(net, optimizer, [made], step, step + 1)
        widths.append(made.width)
        if made.width is not None:
            assert levels(net) <= 2**made.width
    assert widths == [None] * 3 + [8] * 8 + [6] * 8 + [4] * 21


def test_before_the_start_training_is_as_without():
    free, net = network(), network()
    train(free, adamw(free), [], last=5)
    made = quantizer(net, start=10, end=20)
    train_on_grid(net, made, last=5)
    assert net[0].weight.equal(free[0].weight)
    assert made.grids == {}


@pytest.mark.parametrize("pruning_first", [True, False])
def test_with_pruning_zeros_stay_and_the_order_does_not_matter(pruning_first):
    results = []
    for order in (pruning_first, not pruning_first):
        net = network()
        optimizer = adamw(net)
        pruner = Pruner(0.6, interval=4, end=0.5)
        pruner.at(0, STEPS)
        made = quantizer(net, interval=3)
        for constraint in (pruner, made) if order else (made, pruner):
            handle = constrain(optimizer, weights(net), constraint)
        train(net, optimizer, [pruner, made])
        masks = [optimizer.state[w]["hf_compress_mask"] for w in weights(net).values()]
        assert sum(int((~mask).sum()) for mask in masks) == round(0.6 * (16 * 32 + 32 * 4))
        assert all((w[~m] == 0).all() for w, m in zip(weights(net).values(), masks, strict=True))
        assert levels(net) <= 16
        handle.remove()
        assert not any(str(key).startswith("hf_compress") for key in optimizer.state[net[0].weight])
        results.append(net[0].weight.detach())
    assert results[0].equal(results[1])


OPTIMIZERS = {
    "adamw": adamw,
    "fused adamw": lambda net: torch.optim.AdamW(net.parameters(), lr=1e-2, fused=True),
    "sgd": lambda net: torch.optim.SGD(net.parameters(), lr=1e-2, momentum=0.9),
    "adafactor": lambda net: torch.optim.Adafactor(net.parameters(), lr=1e-2),
}


@pytest.mark.parametrize("make", OPTIMIZERS)
@pytest.mark.parametrize("stop", [7, 22])
@pytest.mark.parametrize(
    ("extra", "dtype"),
    [("pruning", torch.float32), ("pruning", torch.bfloat16), ("learned scales", torch.float32)],
)
def test_resume_is_bit_equal(make, dtype, stop, extra):
    def start(done=0, saved=None):
        net = network(dtype)
        optimizer = OPTIMIZERS[make](net)
        if saved is not None:
            net.load_state_dict(saved[0])
            optimizer.load_state_dict(saved[1])
        pruner = Pruner(0.5, interval=4, end=20)
        pruner.at(done, STEPS)
        settings = {"symmetric": False, "grid": "mse", "group_size": 8, "start": 3, "end": 24}
        settings["learn_scale"] = extra == "learned scales"
        made = quantizer(net, (8, 4), done=done, interval=5, **settings)
        constraints = [made, *([pruner] if extra == "pruning" else [])]
        for constraint in constraints:
            constrain(optimizer, weights(net), constraint)
        return net, optimizer, constraints

    whole = start()
    train(*whole)
    part = start()
    train(*part, last=stop)
    rest = start(stop, copy.deepcopy((part[0].state_dict(), part[1].state_dict())))
    assert rest[0][0].weight.equal(part[0][0].weight)
    train(*rest, first=stop)
    for name, weight in weights(whole[0]).items():
        assert weight.equal(weights(rest[0])[name])
        grid, other = whole[2][0].grids[name], rest[2][0].grids[name]
        assert grid.scale.equal(other.scale)
        assert grid.zero_point.equal(other.zero_point)
        assert grid.bits == other.bits == 4
    assert rest[2][0].finished


def test_weights_that_were_not_loaded_are_told():
    net = network()
    optimizer = train_on_grid(net, quantizer(net), last=5)
    saved = copy.deepcopy(optimizer.state_dict())
    rest = network()
    optimizer = adamw(rest)
    optimizer.load_state_dict(saved)
    with pytest.raises(ValueError, match="weights were not loaded"):
        constrain(optimizer, weights(rest), quantizer(rest, done=5))


@pytest.mark.parametrize("settings", [{"symmetric": False}, {"group_size": 8}, {"learn_scale": True}])
def test_a_checkpoint_of_other_settings_is_refused(settings):
    net = network()
    saved = train_on_grid(net, quantizer(net), last=2).state_dict()
    optimizer = adamw(net)
    optimizer.load_state_dict(saved)
    with pytest.raises(ValueError, match="holds another kind of grid for 0.weight: resume with the"):
        constrain(optimizer, weights(net), quantizer(net, done=2, **settings))


def test_gradients_of_clipped_weights_do_not_pass():
    net = nn.Sequential(nn.Linear(3, 1, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[7.5, -7.5, 2.0]]))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    made = quantizer(net, grid="absmax")
    constrain(optimizer, weights(net), made)
    # The scale is 1: 7.5 rounds to 8, beyond the last code, and -7.5 to -8, which is one.
    assert net[0].weight.tolist() == [[7.0, -8.0, 2.0]]
    net(torch.ones(1, 3)).sum().backward()
    made.at(1, STEPS)
    optimizer.step()
    latent = optimizer.state[net[0].weight]["hf_compress_latent"]
    torch.testing.assert_close(latent, torch.tensor([[7.5, -7.6, 1.9]]))


def test_detaching_late_leaves_the_next_constraints_alone():
    net = network()
    optimizer = adamw(net)
    old = constrain(optimizer, weights(net), quantizer(net))
    old.remove()
    made = quantizer(net)
    constrain(optimizer, weights(net), made)
    old.remove()
    train(net, optimizer, [made])
    assert "hf_compress_scale" in optimizer.state[net[0].weight]
    assert levels(net) <= 16


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 1}, "from 2 to 8"),
        ({"bits": (8, 9)}, "several that fall"),
        ({"bits": (4, 4)}, "several that fall"),
        ({"bits": ()}, "several that fall"),
        ({"bits": (8, 1)}, "from 2 to 8"),
        ({"start": 0.9, "end": 0.1}, "after"),
        ({"interval": 0}, "1 or more"),
        ({"grid": "lsq"}, "allowed are"),
    ],
)
def test_refused_when_made(settings, message):
    with pytest.raises(ValueError, match=message):
        Quantizer(**({"bits": 4} | settings))


def test_refused_when_attached():
    net = network()
    optimizer = adamw(net)
    before = copy.deepcopy(net.state_dict())
    cases = [
        (quantizer(net, group_size=5), "5 does not divide the 16 input features of 0.weight: 2, 4, 8"),
        (Quantizer(4), "pass `targets=find_targets"),
        (quantizer(net, end=99), "ends at step 99"),
    ]
    for made, message in cases:
        made.at(0, STEPS)
        with pytest.raises(ValueError, match=message):
            constrain(optimizer, weights(net), made)
    with pytest.raises(RuntimeError, match=r"quantizer\.at\(step, max_steps\)"):
        constrain(optimizer, weights(net), Quantizer(4, targets=find_targets(net).targets))
    assert all(value.equal(before[name]) for name, value in net.state_dict().items())
    with pytest.raises(ValueError, match=r"0.weight is torch.bfloat16, too coarse to learn a scale"):
        quantizer(net.bfloat16(), learn_scale=True).check(weights(net))
    net.float()
    with torch.no_grad():
        net[2].weight[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"2.weight holds weights that are not finite"):
        constrain(optimizer, weights(net), quantizer(net))
