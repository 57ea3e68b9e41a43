import pytest
import torch
from transformers.pytorch_utils import Conv1D

from hf_compress.pruning.patterns import SMALL, Pattern, block_sums, keep_n_of_m, spread
from hf_compress.pruning.pruner import Pruner
from hf_compress.pruning.ranking import contests
from hf_compress.pruning.scores import magnitude
from hf_compress.targets import Target


def target(weight, input_dim=1):
    return {"w": Target("w", torch.nn.Parameter(weight), input_dim)}


def ranked(weight, pattern, sparsity=None, *, scope="global", input_dim=1):
    """The mask of one weight by magnitude."""
    sparsity = Pruner(sparsity, pattern=pattern, scope=scope).schedule.final
    (contest,) = contests({"w": weight}, Pattern.parse(pattern), scope, target(weight, input_dim))
    due = contest.due(sparsity, final=sparsity, floor=0)
    (mask,) = contest.rank(magnitude, [(weight,)], due, at_least=0.0)
    return mask


@pytest.mark.parametrize("m", [2, 4, SMALL, SMALL + 1, 50])
def test_n_of_m_is_what_stable_sorting_keeps(m):
    for n in range(m + 1):
        score = torch.randint(0, 4, (40, 3 * m)).float()  # many ties
        groups = score.reshape(-1, m)
        best = groups.argsort(dim=1, descending=True, stable=True)[:, :n]
        wanted = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, best, True)
        assert keep_n_of_m(score, n, m).equal(wanted.reshape(score.shape))


def test_two_of_four_by_hand():
    weight = torch.tensor([[1.0, -4.0, 3.0, 2.0, 9.0, 9.0, 9.0, 0.0]])
    assert ranked(weight, "2:4").tolist() == [[False, True, True, False, True, True, False, False]]


def test_n_of_m_lies_along_the_input_in_every_layout():
    weight = torch.randn(8, 12)
    mask = ranked(weight, "1:4")
    assert (mask.reshape(8, 3, 4).sum(-1) == 1).all()
    assert ranked(weight.t().contiguous(), "1:4", input_dim=0).equal(mask.t())
    experts = torch.stack([weight, -2 * weight])
    assert ranked(experts, "1:4", input_dim=-1).equal(torch.stack([mask, mask]))


def test_a_conv1d_is_where_the_input_comes_first():
    layer = Conv1D(8, 4)  # 4 inputs, 8 outputs
    mask = ranked(layer.weight.detach(), "2:4", input_dim=0)
    assert (mask.sum(0) == 2).all()


def test_blocks_by_hand():
    # Sums of the blocks of two outputs and two inputs: 4, 10, 26, 6.
    weight = torch.tensor([[1.0, 1, 2, 2], [1, 1, 3, 3], [6, 6, 1, 2], [7, 7, 1, 2]])
    assert block_sums(weight, (2, 2)).tolist() == [[4, 10], [26, 6]]
    assert (
        ranked(weight, "2x2", 0.5).tolist()
        == [[False, False, True, True]] * 2 + [[True, True, False, False]] * 2
    )
    # One output and two inputs in a Linear; the same in the layout of Conv1D.
    mask = ranked(weight, "1x2", 0.5)
    assert ranked(weight.t().contiguous(), "1x2", 0.5, input_dim=0).equal(mask.t())


def test_spreading_is_the_way_back():
    mask = torch.tensor([[True, False], [False, True]])
    assert spread(mask, (1, 2)).tolist() == [[True, True, False, False], [False, False, True, True]]
    assert block_sums(spread(mask, (3, 2)).float(), (3, 2)).equal(6 * mask.float())


def test_rows_are_output_features():
    weight = torch.tensor([[1.0, 1, 1], [0, 0, 9], [2, 0, 0], [1, 0, 0]])
    mask = ranked(weight, "row", 0.5)
    assert mask.tolist() == [[True] * 3, [True] * 3, [False] * 3, [False] * 3]
    assert ranked(weight.t().contiguous(), "row", 0.5, input_dim=0).equal(mask.t())


def test_in_scope_row_each_output_feature_loses_as_many():
    weight = torch.randn(6, 10) * torch.arange(1.0, 7)[:, None]
    mask = ranked(weight, "unstructured", 0.7, scope="row")
    assert (mask.sum(1) == 3).all()
    for row, kept in zip(weight.abs(), mask, strict=True):
        assert row[kept].min() > row[~kept].max()
    blocks = ranked(weight, "2x2", 0.6, scope="row")
    assert (block_sums(blocks.float(), (2, 2)).sum(1) == 2 * 4).all()


@pytest.mark.parametrize("sparsity", [i / 100 for i in range(100)])
def test_blocks_are_the_fewest_that_reach_the_sparsity(sparsity):
    weight = torch.randn(8, 12)
    pruned = int((~ranked(weight, "4x2", sparsity)).sum())
    asked = round(sparsity * weight.numel())
    assert pruned % 8 == 0
    assert asked <= pruned < asked + 8


@pytest.mark.parametrize("name", ["2:4", "4:8", "1:3", "3:7"])
def test_a_ramp_of_n_of_m_falls_by_whole_weights(name):
    n, m = map(int, name.split(":"))
    weight = torch.randn(4, 2 * m)
    (contest,) = contests({"w": weight}, Pattern.parse(name), "global", target(weight))
    final = 1 - n / m
    due = [contest.due(final * i / 50, final=final, floor=0) for i in range(50)]
    due.append(contest.due(final, final=final, floor=0))
    assert due == sorted(due)
    assert due[-1] == 8 * (m - n)
    for pruned in sorted(set(due)):
        (mask,) = contest.rank(magnitude, [(weight,)], pruned, at_least=0.0)
        assert (mask.reshape(-1, m).sum(1) == m - pruned // 8).all()


def test_rows_compete_with_rows_of_their_length():
    weights = {"a": torch.randn(4, 6), "b": torch.randn(2, 6), "c": torch.randn(4, 3)}
    targets = {name: Target(name, torch.nn.Parameter(w), 1) for name, w in weights.items()}
    groups = contests(weights, Pattern.parse("row"), "global", targets)
    assert [list(group.weights) for group in groups] == [["a", "b"], ["c"]]


@pytest.mark.parametrize(
    ("pattern", "shape", "input_dim", "scope"),
    [("2:4", (8, 6), 1, "global"), ("2:4", (6, 8), 0, "layer"), ("4x1", (6, 8), 1, "global")],
)
def test_what_cannot_be_divided_is_refused_by_name_and_shape(pattern, shape, input_dim, scope):
    weight = torch.randn(shape)
    with pytest.raises(ValueError, match=rf"does not divide w, whose shape is \({shape[0]}, "):
        contests({"w": weight}, Pattern.parse(pattern), scope, target(weight, input_dim))


@pytest.mark.parametrize("pattern", ["2:4", "row", "4x1"])
def test_the_input_dimension_must_be_known(pattern):
    with pytest.raises(ValueError, match=r"find_targets\(model\)\.targets"):
        contests({"w": torch.randn(8, 8)}, Pattern.parse(pattern), "global", None)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("4:2", "prunes nothing"),
        ("4:4", "prunes nothing"),
        ("0:4", "allowed are"),
        ("2-4", "allowed are"),
        ("4x", "allowed are"),
        ("0x4", "allowed are"),
        ("", "allowed are"),
        (None, "allowed are"),
        ((2, 4), "allowed are"),
    ],
)
def test_wrong_patterns(wrong, message):
    with pytest.raises(ValueError, match=message):
        Pattern.parse(wrong)
