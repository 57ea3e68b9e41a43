import csv
import json
import math
import statistics
import warnings

import pytest
import torch
from accelerate import cpu_offload
from tiny import tiny_bert, tiny_gpt2, tiny_mixtral
from torch import nn

from hf_compress.quantization.analysis import ERRORS, HISTOGRAMS, analyse
from hf_compress.quantization.grids import fake_quantize
from hf_compress.quantization.schemes import GRIDS, Scheme, fit
from hf_compress.quantization.statistics import SCHEMES


def one_layer(rows, dtype=torch.float32):
    weight = torch.as_tensor(rows, dtype=dtype)
    layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=dtype)
    layer.weight.data.copy_(weight)
    return layer


def only(analysis):
    (weight,) = analysis.weights.values()
    return weight


def moments(values):
    """Median, mean, spread, skew, kurtosis and outliers, by the book in double precision."""
    mean, spread = statistics.fmean(values), statistics.pstdev(values)
    standard = [(value - mean) / spread for value in values]
    return {
        "median": statistics.median(values),
        "mean": mean,
        "spread": spread,
        "skew": statistics.fmean(z**3 for z in standard),
        "kurtosis": statistics.fmean(z**4 for z in standard) - 3,
        "outliers": statistics.fmean(abs(z) > 3 for z in standard),
    }


def error_of_minmax(groups, bits):
    """The relative error of the grid from the lowest to the highest, with a zero point."""
    squares = 0.0
    half = 2 ** (bits - 1)
    for group in groups:
        low, high = min(0.0, *group), max(0.0, *group)
        scale = (high - low) / (2**bits - 1)
        zero = -half - round(low / scale)
        values = [scale * (code - zero) for code in range(-half, half)]
        squares += sum(min((value - weight) ** 2 for value in values) for weight in group)
    return math.sqrt(squares / sum(weight**2 for group in groups for weight in group))


def assert_by_the_book(found, values):
    for column, expected in moments(values).items():
        assert vars(found)[column] == pytest.approx(expected, rel=1e-4, abs=2e-5), column
    assert found.norm == pytest.approx(math.sqrt(sum(value**2 for value in values)), rel=1e-5)
    assert (found.lowest, found.highest) == (min(values), max(values))
    assert sum(found.histogram) == len(values)


@pytest.fixture(scope="module")
def analysis():
    return analyse(tiny_bert(layers=1), bits=(4, 2), group_size=16)


def test_numbers_by_hand():
    found = only(analyse(one_layer([[1.0, 2.0, 3.0, 10.0]]), bits=2))
    assert found.shape == (1, 4)
    assert found.median == 2.5
    assert found.mean == 4
    assert found.spread == pytest.approx(math.sqrt(12.5))
    assert found.skew == pytest.approx(45 / 12.5**1.5)
    assert found.kurtosis == pytest.approx(348.5 / 12.5**2 - 3)
    assert found.outliers == 0
    assert found.norm == pytest.approx(math.sqrt(114))
    # Of 100 bins from 1 to 10: the first, those of 1/9 and 2/9, and the last.
    assert [place for place, count in enumerate(found.histogram) if count] == [0, 11, 22, 99]
    errors, ranges = found.errors[2], found.ranges[2]
    # The values -40/3, -20/3, 0, 20/3; then -20, -10, 0, 10; then 0, 10/3, 20/3, 10.
    assert errors["absmax"] == pytest.approx(math.sqrt((1 + 4 + 9 + 100 / 9) / 114))
    assert errors["minmax"] == pytest.approx(math.sqrt(14 / 114))
    assert errors["affine minmax"] == pytest.approx(math.sqrt((1 + 16 / 9 + 1 / 9) / 114))
    assert ranges["absmax"] == pytest.approx((-40 / 3, 20 / 3))
    assert ranges["minmax"] == pytest.approx((-20, 10))
    assert ranges["affine minmax"] == pytest.approx((0, 10))


def test_outliers_lie_beyond_three_standard_deviations():
    values = torch.ones(1000)
    values[::2] = -1
    values[:2] = 100.0
    found = only(analyse(one_layer(values.view(10, 100)), bits=8))
    assert found.outliers == 0.002
    assert_by_the_book(found, values.tolist())


def test_inputs_of_conv1d_are_its_rows():
    model = tiny_gpt2(layers=1)
    name = "transformer.h.0.mlp.c_fc.weight"
    found = analyse(model, bits=3, group_size=16, targets=name).weights[name]
    columns = model.get_parameter(name).T.tolist()
    assert_by_the_book(found, [value for column in columns for value in column])
    groups = [column[start : start + 16] for column in columns for start in (0, 16)]
    assert found.errors[3]["affine minmax"] == pytest.approx(error_of_minmax(groups, 3), rel=1e-4)


@pytest.mark.parametrize("group_size", [None, 16, "tensor"])
def test_each_expert_has_its_own_grids(group_size):
    model = tiny_mixtral(layers=1, experts=2)
    name = "model.layers.0.mlp.experts.down_proj"
    weight = model.get_parameter(name)
    with torch.no_grad():
        weight[1] *= 10
    found = analyse(model, bits=2, group_size=group_size, targets=name).weights[name]
    assert found.shape == (2, 32, 64)
    assert_by_the_book(found, weight.flatten().tolist())
    groups = weight.reshape(-1, {None: 64, 16: 16, "tensor": 32 * 64}[group_size]).tolist()
    assert found.errors[2]["affine minmax"] == pytest.approx(error_of_minmax(groups, 2), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_errors_are_those_of_the_grids_that_training_has(dtype):
    # More weights than are searched at once.
    weight = torch.randn(1030, 512).mul_(0.02).to(dtype)
    found = only(analyse(one_layer(weight, dtype), bits=3))
    for label, (grid, symmetric) in SCHEMES.items():
        fitted = fit(weight, Scheme(bits=3, symmetric=symmetric, grid=grid))
        difference = fake_quantize(weight, fitted).double() - weight.double()
        expected = (difference.norm() / weight.double().norm()).item()
        assert found.errors[3][label] == pytest.approx(expected, rel=1e-5)
        zero_point = 0 if fitted.zero_point is None else fitted.zero_point.double()
        low, high = ((fitted.scale.double() * (code - zero_point)).mean().item() for code in (-4, 3))
        assert found.ranges[3][label] == pytest.approx((low, high), rel=1e-4, abs=1e-8)
    assert found.best(3) == min(found.errors[3], key=found.errors[3].get)


def test_bfloat16_is_computed_in_float32():
    weight = torch.randn(64, 64).add_(0.3).bfloat16()
    assert_by_the_book(
        only(analyse(one_layer(weight, torch.bfloat16), bits=8)), weight.flatten().tolist()
    )


def test_every_grid_is_measured_but_the_one_that_mixes_them():
    assert {grid for grid, _ in SCHEMES.values()} == {*GRIDS} - {"auto"}


@pytest.mark.parametrize("value", [0.0, 0.3])
def test_weights_that_are_all_equal(value, tmp_path):
    analysis = analyse(one_layer(torch.full((3, 8), value)), bits=(4, 2))
    found = only(analysis)
    assert (found.median, found.mean, found.spread) == pytest.approx((value, value, 0))
    assert (found.skew, found.kurtosis, found.outliers) == (0, 0, 0)
    assert found.errors[4]["minmax"] == pytest.approx(0, abs=1e-6)
    if value == 0:
        assert set(found.errors[2].values()) == {0.0}
        assert found.best(2) == "absmax"
        assert set(analysis.errors(2).values()) == {0.0}
    json.dumps(analysis.to_dict(), allow_nan=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        analysis.draw(tmp_path)


def test_all_weights_together():
    model = nn.Sequential(one_layer([[1.0, 2.0, 3.0, 10.0]]), one_layer([[7.0], [0.0]]))
    together = analyse(model, bits=2).errors(2)
    assert together["minmax"] == pytest.approx(math.sqrt(14 / (114 + 49)))


def test_the_table_says_what_was_found(analysis):
    head, *rows = str(analysis).splitlines()
    assert head.split()[4:] == [*moments([0, 1]), "4", "bit", "2", "bit"]
    for row, (name, weight) in zip(rows, analysis.weights.items(), strict=False):
        best = [weight.best(bits) for bits in (4, 2)]
        expected = [name, *(f"{vars(weight)[column]:.3g}" for column in moments([0, 1]))]
        for bits, grid in zip((4, 2), best, strict=True):
            expected += [*grid.split(), f"{weight.errors[bits][grid]:.4f}"]
        assert row.split() == expected
    rows = rows[len(analysis.weights) :]
    assert rows[0].split() == ["all", "together", "4", "bit", "2", "bit"]
    for row, grid in zip(rows[1:], SCHEMES, strict=False):
        errors = [f"{analysis.errors(bits)[grid]:.4f}" for bits in (4, 2)]
        assert row.split() == [*grid.split(), *errors]
    assert f"left out: {len(analysis.skipped)} weights" in rows
    assert "  1 x output head" in rows


def test_it_can_be_read_back(analysis, tmp_path):
    assert json.loads(json.dumps(analysis.to_dict(), allow_nan=False))["group_size"] == 16
    analysis.to_csv(tmp_path / "weights.csv")
    with open(tmp_path / "weights.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["weight"] for row in rows] == list(analysis.weights)
    for row, weight in zip(rows, analysis.weights.values(), strict=True):
        assert row["shape"] == "x".join(map(str, weight.shape))
        for column in ("median", "mean", "spread", "skew", "kurtosis", "outliers", "norm"):
            assert float(row[column]) == vars(weight)[column]
        for bits in (4, 2):
            assert row[f"best_{bits}"] == weight.best(bits)
            for grid in SCHEMES:
                assert float(row[f"error_{bits}_{grid.replace(' ', '_')}"]) == weight.errors[bits][grid]


def test_pictures_show_something(tmp_path):
    from matplotlib.image import imread

    model = nn.Sequential(*(nn.Linear(4, 2) for _ in range(17)))
    analyse(model, bits=2).draw(tmp_path / "pictures")
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {ERRORS, HISTOGRAMS}
    for path in (tmp_path / "pictures").iterdir():
        assert imread(path)[..., :3].std() > 0.05


def test_the_model_is_not_changed_and_may_be_offloaded():
    model = tiny_bert(layers=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    analysis = analyse(model, bits=2, targets="query")
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    cpu_offload(model, execution_device=torch.device("cpu"), state_dict=before)
    assert model.get_parameter("bert.encoder.layer.0.attention.self.query.weight").is_meta
    assert analyse(model, bits=2, targets="query") == analysis


def test_refusals():
    model = tiny_bert(layers=1)
    for bits in ((), (8, 8), 9, (4, 1), "84", (4.0,)):
        with pytest.raises(ValueError, match="`bits` is"):
            analyse(model, bits=bits)
    with pytest.raises(ValueError, match="24 does not divide the 32 input features of bert"):
        analyse(model, group_size=24)
    with pytest.raises(ValueError, match="`group_size` is 0"):
        analyse(model, group_size=0)
    with pytest.raises(ValueError, match="matches no weight"):
        analyse(model, targets="attn")
    for value in (math.nan, math.inf):
        broken = nn.Sequential(one_layer([[1.0, 2.0]]), one_layer([[1.0, value]]))
        with pytest.raises(ValueError, match=r"1\.weight holds weights that are not finite"):
            analyse(broken)
    with torch.device("meta"):
        empty = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="weight is on the meta device"):
        analyse(empty)
    packed = nn.Sequential(one_layer([[1.0, 2.0]]), one_layer([[1.0, 2.0]]))
    packed[1].weight = nn.Parameter(torch.zeros(1, 2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"1\.weight is packed as torch\.int8"):
        analyse(packed)
