"""Learned scales: the gradient against finite differences, and what training with it does."""

import copy
from dataclasses import replace

import pytest
import torch
from quantization.runs import adamw, levels, network, quantizer, train, weights

from hf_compress.constraint import constrain
from hf_compress.quantization.grids import Grid, fake_quantize
from hf_compress.quantization.learned import learn_scale_, scale_gradient
from hf_compress.quantization.schemes import Scheme, fit


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_gradient_equals_finite_differences(bits, symmetric):
    torch.manual_seed(1)
    groups, gradient = torch.randn(5, 3, 16), torch.randn(5, 3, 16)
    fitted = fit(groups, Scheme(bits=bits, symmetric=symmetric))
    # A little finer, since some weight may lie exactly on the last code, where the slope has two sides.
    grid = replace(fitted, scale=0.97 * fitted.scale)
    weight, scale = groups.double(), grid.scale.double().unsqueeze(-1)
    zero_point = 0.0 if symmetric else grid.zero_point.double().unsqueeze(-1)

    def codes(scale):
        return (weight / scale + zero_point).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) - zero_point

    rounding = codes(scale).round() - codes(scale)

    def values(scale):
        """Smooth in the scale, since what rounding adds is a constant."""
        return (codes(scale) + rounding) * scale

    torch.testing.assert_close(values(scale).float(), fake_quantize(groups, grid))
    step = 1e-6 * scale
    slope = (values(scale + step) - values(scale - step)) / (2 * step)
    expected = (gradient.double() * slope).sum(-1)
    found = scale_gradient(groups, gradient, grid)
    torch.testing.assert_close(found, expected.float(), rtol=1e-3, atol=1e-3)
    assert expected.abs().min() > 0.01


def test_the_gradient_by_hand():
    # Scale 1, 3 bit: 0.3 changes by 0 - 0.3 and 1.6 by 2 - 1.6; 5 is clipped at 3 and -6 at -4.
    groups = torch.tensor([[0.3, 1.6, 5.0, -6.0]])
    grid = Grid(scale=torch.ones(1), zero_point=None, bits=3)
    for member, expected in enumerate((-0.3, 0.4, 3.0, -4.0)):
        gradient = torch.zeros(1, 4)
        gradient[0, member] = 1
        assert scale_gradient(groups, gradient, grid).item() == pytest.approx(expected)


def test_a_step_is_relative_and_groups_without_a_gradient_stay():
    scale = torch.tensor([1e-3, 2.0, 5.0])
    mean, square = torch.zeros(3), torch.zeros(3)
    learn_scale_(scale, torch.tensor([1e-6, -4e3, 0.0]), mean, square, 0.01)
    assert scale.tolist() == pytest.approx([1e-3 * 0.99005, 2 * 1.01005, 5.0], rel=1e-4)
    for _ in range(1000):
        learn_scale_(scale, torch.tensor([1e3, 1e3, 0.0]), mean, square, 0.01)
    assert (scale > 0).all()
    assert scale[2] == 5


def test_learned_scales_of_two_bits_train_further_where_the_learning_rate_falls():
    settings = {"first fit": {"interval": 10**6}, "refitted": {}, "learned": {"learn_scale": True}}
    losses = dict.fromkeys(settings, 0.0)
    for seed in range(3):
        dense = network()
        torch.manual_seed(seed)
        with torch.no_grad():
            for param in dense.parameters():
                param.normal_(std=0.15)
        train(dense, adamw(dense), [], last=150)
        for name, chosen in settings.items():
            net = copy.deepcopy(dense)
            made = quantizer(net, 2, total=160, **chosen)
            optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
            constrain(optimizer, weights(net), made)
            for step in range(160):
                optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / 160)
                train(net, optimizer, [made], step, step + 1, total=160)
            assert levels(net) <= 4
            x = torch.randn(256, 16, generator=torch.Generator().manual_seed(99))
            with torch.no_grad():
                losses[name] += (net(x) - 2 * x[:, :4]).square().mean().item()
    assert losses["learned"] < losses["refitted"] < losses["first fit"]


def test_new_bits_are_fitted_and_the_last_grid_is_fixed():
    net = network()
    made = quantizer(net, (8, 4), learn_scale=True, end=20)
    optimizer = adamw(net)
    constrain(optimizer, weights(net), made)
    scales = []
    for step in range(30):
        train(net, optimizer, [made], step, step + 1)
        scales.append(made.grids["0.weight"].scale.clone())
    ratios = [(later / earlier).mean() for earlier, later in zip(scales, scales[1:], strict=False)]
    assert ratios[18] > 5  # from 8 to 4 bit
    assert all(0.98 < ratio < 1.02 and ratio != 1 for ratio in ratios[:18])
    assert all(scale.equal(scales[19]) for scale in scales[19:])
