"""GPTQ against a plain rendering of its paper, in double precision."""

import pytest
import torch

from hf_compress.calibration.second_order import add_gram
from hf_compress.quantization.gptq import gptq, ordered_factor
from hf_compress.quantization.grids import fake_quantize, grouped
from hf_compress.quantization.schemes import Scheme, fit

DAMPING = 0.01


def layer(rows=6, width=24, positions=300, seed=0):
    """A weight (rows, width), and correlated inputs (positions, width) of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator) * torch.logspace(-0.5, 0.5, width)
    inputs = torch.randn(positions, width, generator=generator) @ mix
    return torch.randn(rows, width, generator=generator), inputs


def on_grid(weight, scheme):
    """The grid of `weight`, and the weight rounded to nearest on it."""
    groups = grouped(weight, input_dim=1, group_size=scheme.group_size)
    grid = fit(groups, scheme)
    return grid, fake_quantize(groups, grid).view(weight.shape)


def found(weight, inputs, grid):
    order, factor = ordered_factor(add_gram(None, inputs), damping=DAMPING)
    return gptq(weight, order, factor, grid)


def naive(weight, inputs, grid):
    """For each column in turn the inverse Hessian of it and all that are not rounded yet."""
    inputs = inputs.double()
    rows, width = weight.shape
    hessian = inputs.T @ inputs
    order = sorted(range(width), key=lambda j: -hessian[j, j].item())
    hessian += DAMPING * hessian.diagonal().mean() * torch.eye(width, dtype=torch.float64)
    result = weight.double().clone()
    members = width // grid.scale.shape[1]
    for step, j in enumerate(order):
        left = order[step:]
        inverse = torch.linalg.inv(hessian[left][:, left])
        for i in range(rows):
            place = (i % grid.scale.shape[0], j // members)
            scale = grid.scale[place].double().item()
            zero_point = 0 if grid.zero_point is None else grid.zero_point[place].item()
            code = round(result[i, j].item() / scale) + zero_point
            code = min(max(code, grid.lowest), grid.highest)
            value = 0.0 if weight[i, j] == 0 else scale * (code - zero_point)
            error = (result[i, j].item() - value) / inverse[0, 0].item()
            result[i, left] -= error * inverse[0]
            result[i, j] = value
    return result


SCHEMES = [
    Scheme(bits=4),
    Scheme(bits=2, group_size=8),
    Scheme(bits=3, group_size="tensor", grid="minmax"),
    Scheme(bits=3, group_size=12, symmetric=False),
    Scheme(bits=4, group_size=4, symmetric=False, grid="median"),
    Scheme(bits=8, grid="absmax"),
]


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_equals_the_paper_entry_by_entry(scheme, sparse):
    weight, inputs = layer()
    if sparse:
        weight[torch.rand(weight.shape, generator=torch.Generator().manual_seed(3)) < 0.5] = 0
    before = weight.clone()
    grid, nearest = on_grid(weight, scheme)
    rounded = found(weight, inputs, grid)
    assert weight.equal(before)
    torch.testing.assert_close(rounded, naive(weight, inputs, grid).float(), rtol=1e-5, atol=1e-6)
    assert rounded[weight == 0].eq(0).all()
    groups = grouped(rounded, input_dim=1, group_size=scheme.group_size)
    assert fake_quantize(groups, grid).equal(groups)
    if not sparse:
        lost, lost_by_nearest = ((inputs @ (w - weight).T).norm() for w in (rounded, nearest))
        assert lost < 0.9 * lost_by_nearest


def test_equals_the_paper_over_several_blocks():
    weight, inputs = layer(rows=3, width=144, positions=600)
    grid, _ = on_grid(weight, Scheme(bits=3, group_size=48))
    wanted = naive(weight, inputs, grid).float()
    torch.testing.assert_close(found(weight, inputs, grid), wanted, rtol=1e-5, atol=1e-6)


def test_columns_go_by_their_inputs_and_come_back_in_place():
    weight, inputs = layer()
    shuffled = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    grid, _ = on_grid(weight, Scheme(bits=3))
    moved, _ = on_grid(weight[:, shuffled], Scheme(bits=3))
    assert found(weight[:, shuffled], inputs[:, shuffled], moved).equal(
        found(weight, inputs, grid)[:, shuffled]
    )


def test_without_inputs_it_is_round_to_nearest():
    weight, _ = layer()
    grid, nearest = on_grid(weight, Scheme(bits=3, group_size=8))
    assert gptq(weight, *ordered_factor(torch.zeros(24, 24)), grid).equal(nearest)


def test_features_that_are_never_seen_are_rounded_to_nearest():
    weight, inputs = layer()
    inputs[:, [3, 17]] = 0
    grid, nearest = on_grid(weight, Scheme(bits=3))
    rounded = found(weight, inputs, grid)
    assert rounded[:, [3, 17]].equal(nearest[:, [3, 17]])
    assert not rounded.equal(nearest)
