import pytest
import torch

from hf_compress.pruning.scores import magnitude, obd
from hf_compress.pruning.select import PIECE, count_kept, keep_highest


def naive(scores, kept):
    """The definition: sort all scores, prune the lowest, equal ones in order."""
    flat = torch.cat([score.flatten() for score in scores])
    order = flat.argsort(stable=True)
    mask = torch.ones(len(flat), dtype=torch.bool)
    mask[order[: len(flat) - kept]] = False
    return mask.split([score.numel() for score in scores])


def identity(score):
    return score


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kept", [0, 1, 37, 500, 999, 1110])
def test_equals_sorting_over_several_tensors(dtype, kept):
    scores = [torch.randn(n, m).to(dtype) for n, m in ((10, 40), (1, 10), (70, 10))]
    masks = keep_highest(identity, [(score,) for score in scores], kept)
    for mask, wanted, score in zip(masks, naive(scores, kept), scores, strict=True):
        assert mask.shape == score.shape
        assert mask.flatten().equal(wanted)


def test_every_fraction_is_exact():
    weight = torch.randn(100)
    for percent in range(100):
        kept = 100 - round(percent / 100 * 100)
        (mask,) = keep_highest(magnitude, [(weight,)], kept)
        assert int(mask.sum()) == kept


@pytest.mark.parametrize("value", [0.0, 1.0, -2.5])
def test_equal_scores_are_pruned_from_the_front(value):
    masks = keep_highest(identity, [(torch.full((3, 5), value),), (torch.full((7,), value),)], 10)
    assert torch.cat([mask.flatten() for mask in masks]).tolist() == [False] * 12 + [True] * 10


def test_minus_zero_equals_zero():
    (mask,) = keep_highest(identity, [(torch.tensor([0.0, -0.0, 0.0, -0.0]),)], 2)
    assert mask.tolist() == [False, False, True, True]


def test_ties_across_pieces():
    scores = torch.zeros(2 * PIECE + 5)
    scores[PIECE + 3] = 1.0
    (mask,) = keep_highest(identity, [(scores,)], 4)
    assert mask.nonzero().flatten().tolist() == [PIECE + 3, 2 * PIECE + 2, 2 * PIECE + 3, 2 * PIECE + 4]


def test_twenty_million_weights():
    weight = torch.randn(20_000_000)
    (mask,) = keep_highest(magnitude, [(weight,)], 2_000_000)
    assert int(mask.sum()) == 2_000_000
    assert weight[mask].abs().min() >= weight[~mask].abs().max()


def test_formula_of_two_tensors():
    weight, average = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([9.0, 0.1, 0.5])
    (mask,) = keep_highest(obd, [(weight, average)], 2)  # scores 9, 0.4, 4.5
    assert mask.tolist() == [True, False, True]


def test_no_layer_collapses():
    weak, strong = torch.rand(1000) * 1e-6, torch.rand(1000) + 1
    masks = keep_highest(magnitude, [(weak,), (strong,)], 200, at_least=0.05)
    assert [count_kept(mask) for mask in masks] == [50, 150]
    assert weak[masks[0]].min() >= weak[~masks[0]].max()


@pytest.mark.parametrize("at_least", [0.01, 0.1, 0.19])
@pytest.mark.parametrize("seed", range(6))
def test_floors_equal_their_definition(seed, at_least):
    """One after the other, whatever would keep less than its floor gets it, and the others share."""
    draw = torch.Generator().manual_seed(seed)
    # Scales close to each other, so that giving one its floor starves the next.
    scores = [
        torch.rand(int(n), generator=draw) * 1.1**i
        for i, n in enumerate(torch.randint(20, 400, (9,), generator=draw))
    ]
    kept = sum(map(len, scores)) // 5
    floors = [int(at_least * len(score)) for score in scores]
    expected, free, rest = {}, list(range(len(scores))), kept
    while True:
        chosen = dict(zip(free, naive([scores[i] for i in free], rest), strict=True))
        starved = [i for i in free if int(chosen[i].sum()) < floors[i]]
        if not starved:
            break
        (expected[starved[0]],) = naive([scores[starved[0]]], floors[starved[0]])
        rest -= floors[starved[0]]
        free.remove(starved[0])
    masks = keep_highest(identity, [(score,) for score in scores], kept, at_least=at_least)
    for i, mask in enumerate(masks):
        assert mask.equal((expected | chosen)[i]), i


def test_the_guard_gives_way_to_the_target():
    masks = keep_highest(magnitude, [(torch.rand(100),), (torch.rand(100) + 1,)], 4, at_least=0.5)
    assert [count_kept(mask) for mask in masks] == [2, 2]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), -float("nan")])
def test_scores_that_are_not_finite_are_refused(bad):
    with pytest.raises(ValueError, match="1 scores are NaN or infinite"):
        keep_highest(identity, [(torch.tensor([1.0, bad, 2.0]),)], 1)


@pytest.mark.parametrize("kept", [-1, 5])
def test_impossible_counts_are_refused(kept):
    with pytest.raises(ValueError, match="cannot keep"):
        keep_highest(identity, [(torch.rand(4),)], kept)
