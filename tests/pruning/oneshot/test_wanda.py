import pytest
import torch

from hf_compress.pruning.oneshot.wanda import add_squares, wanda_mask


def naive(weight, inputs, sparsity, n_of_m):
    """The paper in double precision, one output feature after the other."""
    keep = torch.ones_like(weight, dtype=torch.bool)
    norms = [inputs[:, j].double().norm().item() for j in range(weight.shape[1])]
    for i, row in enumerate(weight.double().tolist()):
        score = [abs(w) * norm for w, norm in zip(row, norms, strict=True)]
        width = len(row)
        groups = (
            [range(width)]
            if n_of_m is None
            else [range(j, j + n_of_m[1]) for j in range(0, width, n_of_m[1])]
        )
        for group in groups:
            pruned = round(sparsity * width) if n_of_m is None else n_of_m[1] - n_of_m[0]
            for j in sorted(group, key=lambda j: score[j])[:pruned]:
                keep[i, j] = False
    return keep


@pytest.mark.parametrize(
    ("sparsity", "n_of_m"),
    [
        (0.0, None),
        (0.29, None),
        (0.5, None),
        (0.97, None),
        (0.5, (2, 4)),
        (0.25, (3, 4)),
        (0.75, (2, 8)),
    ],
)
def test_equals_the_paper(sparsity, n_of_m):
    weight, inputs = torch.randn(20, 48), torch.randn(100, 48) * torch.rand(48)
    total = add_squares(add_squares(None, inputs[:30]), inputs[30:])
    mask = wanda_mask(weight, total.sqrt(), sparsity=sparsity, n_of_m=n_of_m)
    assert mask.equal(naive(weight, inputs, sparsity, n_of_m))


def test_by_hand():
    weight, norms = (
        torch.tensor([[1.0, -2.0, 3.0, -4.0], [4.0, 3.0, 2.0, 1.0]]),
        torch.tensor([8.0, 3.0, 1.0, 1.0]),
    )
    mask = wanda_mask(weight, norms, sparsity=0.5)  # scores 8 6 3 4 and 32 9 2 1
    assert mask.tolist() == [[True, True, False, False]] * 2


def test_each_row_loses_the_same_whatever_the_ties():
    mask = wanda_mask(torch.zeros(7, 10), torch.ones(10), sparsity=0.3)
    assert mask.sum(1).tolist() == [7] * 7
