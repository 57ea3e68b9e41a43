import math
import statistics
from dataclasses import replace

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from hf_compress.quantization.grids import (
    Grid,
    check_divides,
    check_finite,
    dequantize,
    fake_quantize,
    fake_quantize_,
    grouped,
    quantize,
    stop_clipped_,
)
from hf_compress.quantization.schemes import GRIDS, RATIOS, Scheme, fit

SCHEMES = [
    (grid, symmetric)
    for grid in GRIDS
    for symmetric in (True, False)
    if not (grid == "median" and symmetric) and not (grid == "absmax" and not symmetric)
]


def weights(rows=6, members=48, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, members, generator=generator).mul_(0.02).add_(0.004)


def rows_of(groups, grid):
    """Each group as Python numbers: its members, scale and zero point."""
    zero_point = torch.zeros_like(grid.scale) if grid.zero_point is None else grid.zero_point
    for group, scale, zero in zip(
        groups.double().flatten(0, -2), grid.scale.flatten(), zero_point.flatten(), strict=True
    ):
        yield group.tolist(), scale.item(), int(zero.item())


def over(low, high, bits, symmetric):
    """Scale and zero point, in double precision."""
    lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    if symmetric:
        return max(low / lowest, high / highest), 0
    scale = (high - low) / (2**bits - 1)
    return scale, min(max(lowest - round(low / scale), lowest), highest)


def finer(low, high, bits, symmetric):
    """Of the two symmetric grids, with one code more below zero or above it, the finer one."""
    below, above = over(low, high, bits, symmetric), over(-high, -low, bits, symmetric)
    return (-above[0], 0) if symmetric and bits < 8 and above < below else below


def naive(group, bits, symmetric, grid):
    """All candidates of a grid, in double precision and by the book."""
    low, high = min(0.0, *group), max(0.0, *group)
    if grid == "absmax":
        return [(max(map(abs, group)) * 2 / (2**bits - 1), 0)]
    if grid == "minmax":
        return [over(low, high, bits, symmetric)]
    if grid == "percentile":
        dropped = len(group) // 1000
        kept = sorted(group)[dropped : len(group) - dropped]
        return [over(min(0.0, kept[0]), max(0.0, kept[-1]), bits, symmetric)]
    if grid == "mse":
        return [finer(ratio * low, ratio * high, bits, symmetric) for ratio in RATIOS]
    if grid == "median":
        half, median = 2 ** (bits - 1), statistics.median(group)
        largest = max(max(abs(w - median) for w in group) / (half - 1), abs(median) / half)
        scales = [ratio * largest for ratio in RATIOS]
        return [(s, min(max(-round(median / s), -half), half - 1)) for s in scales]
    names = ("absmax", "minmax", "percentile", "mse") if symmetric else ("minmax", "median", "mse")
    return [candidate for name in names for candidate in naive(group, bits, symmetric, name)]


def error(group, scale, zero, bits):
    """The squared distance to the nearest values of the grid, found by trying all codes."""
    values = [scale * (code - zero) for code in range(-(2 ** (bits - 1)), 2 ** (bits - 1))]
    return sum(min((value - w) ** 2 for value in values) for w in group)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize(("grid", "symmetric"), SCHEMES)
def test_each_grid_is_as_good_as_its_definition_in_double_precision(grid, symmetric, bits):
    groups = weights(rows=3, members=1100 if grid == "percentile" else 24)
    fitted = fit(groups, Scheme(bits=bits, grid=grid, symmetric=symmetric))
    for group, scale, zero in rows_of(groups, fitted):
        candidates = naive(group, bits, symmetric, grid)
        best = min(error(group, *candidate, bits) for candidate in candidates)
        assert error(group, scale, zero, bits) == pytest.approx(best, rel=1e-4)
        assert any(
            scale == pytest.approx(expected, rel=1e-6) and zero == its_zero
            for expected, its_zero in candidates
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [2, 3, 5, 8])
@pytest.mark.parametrize(("grid", "symmetric"), SCHEMES)
def test_values_are_the_nearest_and_stay_the_same(grid, symmetric, bits, dtype):
    groups = weights().to(dtype)
    fitted = fit(groups, Scheme(bits=bits, grid=grid, symmetric=symmetric))
    assert fitted.scale.dtype == dtype
    values, codes = fake_quantize(groups, fitted), quantize(groups, fitted)
    assert values.dtype == dtype
    assert dequantize(codes, fitted).equal(values)
    assert fake_quantize(values, fitted).equal(values)
    assert fake_quantize(torch.zeros_like(groups), fitted).count_nonzero() == 0
    assert int(codes.min()) >= -(2 ** (bits - 1))
    assert int(codes.max()) < 2 ** (bits - 1)
    zero_point = fitted.zero_point
    assert (zero_point is None) == symmetric
    if zero_point is not None:
        assert zero_point.equal(zero_point.round())
        assert zero_point.abs().max() <= 2 ** (bits - 1)
    if dtype == torch.float32 and bits < 5:
        for (group, scale, zero), row in zip(rows_of(groups, fitted), values.tolist(), strict=True):
            grid_values = [scale * (c - zero) for c in range(-(2 ** (bits - 1)), 2 ** (bits - 1))]
            nearest = [min(abs(value - w) for value in grid_values) for w in group]
            found = [abs(value - w) for value, w in zip(row, group, strict=True)]
            assert found == pytest.approx(nearest, abs=1e-6 * max(map(abs, group)))


@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("value", [0.0, 0.3, -0.3, 1e-30, 3e4])
@pytest.mark.parametrize(("grid", "symmetric"), SCHEMES)
def test_groups_of_one_value(grid, symmetric, value, bits):
    for members in (1, 8):
        groups = torch.full((1, members), value)
        fitted = fit(groups, Scheme(bits=bits, grid=grid, symmetric=symmetric))
        assert fitted.scale.isfinite().all()
        assert (fitted.scale != 0).all()
        values = fake_quantize(groups, fitted)
        if grid == "absmax":
            # By its definition the largest lies half a step beyond the last positive code.
            assert (values - value).abs().max() <= abs(value) / (2**bits - 1) * (1 + 1e-4)
        else:
            assert values[0].tolist() == pytest.approx([value] * members, rel=1e-6, abs=1e-36)


@pytest.mark.parametrize("members", [7, 8])
def test_the_median_of_symmetric_weights_is_zero(members):
    half = torch.rand(5, members // 2) + 0.1
    middle = torch.zeros(5, members % 2)
    for dtype in (torch.float32, torch.bfloat16):
        groups = torch.cat([half, middle, -half], 1).to(dtype)
        fitted = fit(groups, Scheme(bits=4, grid="median", symmetric=False))
        assert (fitted.zero_point == 0).all()


def test_the_median_is_the_middle_of_the_codes():
    # Ten weights around 0.6 and one far below: the middle stays where most of them are.
    groups = torch.tensor([[0.55, 0.57, 0.58, 0.59, 0.6, 0.6, 0.6, 0.61, 0.62, 0.63, -0.2]])
    fitted = fit(groups, Scheme(bits=4, grid="median", symmetric=False))
    assert (-fitted.zero_point * fitted.scale).item() == pytest.approx(0.6, abs=fitted.scale.item() / 2)


def test_by_hand():
    groups = torch.tensor([[-0.8, -0.1, 0.0, 0.35, 0.7]])
    symmetric = fit(groups, Scheme(bits=4, grid="minmax"))
    assert symmetric.scale.item() == pytest.approx(0.1)
    assert quantize(groups, symmetric).tolist() in ([[-8, -1, 0, 3, 7]], [[-8, -1, 0, 4, 7]])
    affine = fit(groups, Scheme(bits=4, grid="minmax", symmetric=False))
    assert affine.scale.item() == pytest.approx(0.1)
    assert affine.zero_point.item() == 0
    shifted = fit(groups + 0.8, Scheme(bits=4, grid="minmax", symmetric=False))
    assert shifted.zero_point.item() == -8
    assert fit(groups, Scheme(bits=4, grid="absmax")).scale.item() == pytest.approx(0.8 / 7.5)


def test_a_search_is_never_worse_than_what_it_starts_from():
    for symmetric in (True, False):
        groups = weights(rows=50)
        errors = {}
        for grid in (name for name, kind in SCHEMES if kind == symmetric):
            fitted = fit(groups, Scheme(bits=3, grid=grid, symmetric=symmetric))
            errors[grid] = (fake_quantize(groups, fitted) - groups).square().sum(1)
        assert (errors["mse"] <= errors["minmax"]).all()
        assert all((errors["auto"] <= other).all() for other in errors.values())
        assert errors["mse"].sum() < 0.9 * errors["minmax"].sum()


def test_groups_lie_along_the_inputs_and_share_the_storage():
    weight = torch.arange(24.0).view(4, 6)
    groups = grouped(weight, input_dim=1, group_size=3)
    assert groups.shape == (4, 2, 3)
    assert groups[1, 1].tolist() == [9, 10, 11]
    assert grouped(weight, input_dim=1, group_size=None).shape == (4, 1, 6)
    assert grouped(weight, input_dim=1, group_size="tensor").shape == (1, 1, 24)
    conv = Conv1D(4, 6).weight.detach()
    for size in (3, None, "tensor"):
        groups = grouped(conv, input_dim=0, group_size=size)
        transposed = grouped(conv.t().contiguous(), input_dim=1, group_size=size)
        if size == "tensor":
            assert groups.sort().values.equal(transposed.sort().values)
        else:
            assert groups.equal(transposed.transpose(0, 1))
        assert groups.data_ptr() == conv.data_ptr()
    experts = torch.randn(2, 4, 6)
    assert grouped(experts, input_dim=-1, group_size=2).shape == (2, 4, 3, 2)
    assert grouped(experts, input_dim=-1, group_size="tensor").shape == (2, 1, 1, 24)
    grouped(conv, input_dim=0, group_size=3).zero_()
    assert not conv.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group_size", [None, 16])
def test_equals_torchao_bit_for_bit(bits, group_size, dtype):
    qat = pytest.importorskip("torchao.quantization.qat", reason="torchao is not installed")
    primitives = pytest.importorskip("torchao.quantization.quant_primitives")
    weight = weights(rows=12).to(dtype)
    groups = grouped(weight, input_dim=1, group_size=group_size)

    def ours(grid, *, symmetric):
        fitted = fit(groups, Scheme(bits=bits, symmetric=symmetric, grid=grid))
        return fake_quantize(groups, fitted).view_as(weight)

    config = qat.IntxFakeQuantizeConfig(
        {2: torch.int2, 4: torch.int4, 8: torch.int8}[bits],
        "per_channel" if group_size is None else "per_group",
        group_size=group_size,
        is_symmetric=True,
    )
    assert ours("absmax", symmetric=True).equal(qat.IntxFakeQuantizer(config)(weight))
    if dtype != torch.float32:
        return  # what it stores has float32 scales

    # Its fake quantizer of zero points makes them floats, so that zero is off the grid: what it stores
    # has integers, as ours.
    block, bounds = (1, group_size or 48), (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    for symmetric, mapping in ((True, "SYMMETRIC_NO_CLIPPING_ERR"), (False, "ASYMMETRIC")):
        scale, zero_point = primitives.choose_qparams_affine(
            weight, primitives.MappingType[mapping], block, torch.int8, *bounds
        )
        codes = primitives.quantize_affine(weight, block, scale, zero_point, torch.int8, *bounds)
        theirs = primitives.dequantize_affine(codes, block, scale, zero_point, torch.int8, *bounds)
        assert ours("minmax", symmetric=symmetric).equal(theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize(("grid", "symmetric"), SCHEMES)
def test_in_place_it_is_the_same_and_the_gradient_stops_where_it_clips(grid, symmetric, bits, dtype):
    conv = weights(rows=48, members=8).to(dtype)
    groups = grouped(conv, input_dim=0, group_size=16)  # not contiguous
    fitted = fit(groups, Scheme(bits=bits, grid=grid, symmetric=symmetric))
    fitted = replace(fitted, scale=0.5 * fitted.scale)  # so that some are clipped
    scale, zero = fitted.scale.float(), 0.0 if symmetric else fitted.zero_point.float()
    # Just between two codes too: the nearest even one counts.
    groups[0, :, 0] = (scale * (fitted.highest - zero + 0.5))[0].to(dtype)
    groups[1, :, 1] = (scale * (fitted.lowest - zero - 0.5))[1].to(dtype)
    codes = (groups.float() * (1 / scale).unsqueeze(-1)).round()
    codes += 0.0 if symmetric else zero.unsqueeze(-1)
    beyond = (codes < -(2 ** (bits - 1))) | (codes > 2 ** (bits - 1) - 1)
    assert 0.01 < beyond.float().mean() < 0.9

    given = torch.randn_like(groups)
    gradient = given.clone()
    stop_clipped_(gradient, groups, fitted)
    assert gradient.equal(given.masked_fill(beyond, 0))

    expected = fake_quantize(groups, fitted)
    fake_quantize_(groups, fitted)
    assert groups.equal(expected)
    assert grouped(conv, input_dim=0, group_size=16).equal(expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 1}, "from 2 to 8"),
        ({"bits": 9}, "from 2 to 8"),
        ({"bits": 4.5}, "from 2 to 8"),
        ({"bits": True}, "from 2 to 8"),
        ({"grid": "average"}, r"'average'; allowed are \['absmax', 'auto'"),
        ({"grid": "median"}, "symmetric=False"),
        ({"grid": "absmax", "symmetric": False}, "take 'minmax'"),
        ({"group_size": 0}, "2 or more"),
        ({"group_size": "row"}, "2 or more"),
    ],
)
def test_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Scheme(**({"bits": 4} | settings))


def test_sizes_that_do_not_divide_and_weights_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match=r"64 does not divide the 312.*a.weight: .*52, 78.*`ignore`"):
        check_divides("a.weight", torch.ones(4, 312), input_dim=1, group_size=64)
    check_divides("a.weight", torch.ones(4, 312), input_dim=1, group_size=8)
    check_divides("a.weight", torch.ones(312, 4), input_dim=0, group_size=52)
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="a.weight holds weights that are not finite"):
            check_finite("a.weight", torch.tensor([1.0, bad]))


def test_a_bf16_grid_is_what_files_keep():
    """The scale is rounded before the codes are chosen: what is stored is what was used."""
    groups = weights().bfloat16()
    fitted = fit(groups, Scheme(bits=4))
    stored = Grid(scale=fitted.scale.float(), zero_point=None, bits=4)
    assert quantize(groups, stored).equal(quantize(groups, fitted))
