import pytest
import torch

from hf_compress.calibration.second_order import COLUMNS, add_gram, inverse_factor
from hf_compress.pruning.oneshot.sparsegpt import sparsegpt

DAMPING = 0.01


def layer(rows=10, width=24, positions=200, seed=0):
    """A weight (rows, width), and correlated inputs (positions, width)."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator)
    inputs = torch.randn(positions, width, generator=generator) @ mix
    return torch.randn(rows, width, generator=generator), inputs


def naive(weight, inputs, sparsity, n_of_m, block_size):
    """The paper in double precision: for each column the inverse Hessian of it and all that follow."""
    weight, inputs = weight.double().clone(), inputs.double()
    rows, width = weight.shape
    hessian = inputs.T @ inputs
    hessian += DAMPING * hessian.diagonal().mean() * torch.eye(width, dtype=torch.float64)
    inverses = [torch.linalg.inv(hessian[j:, j:]) for j in range(width)]
    pruned = torch.zeros(rows, width, dtype=torch.bool)
    for start in range(0, width, block_size):
        end = min(start + block_size, width)
        if n_of_m is None:
            entries = [
                (weight[i, j].item() ** 2 / inverses[j][0, 0].item(), i, j)
                for i in range(rows)
                for j in range(start, end)
            ]
            count = round(sparsity * rows * end) - round(sparsity * rows * start)
            for _, i, j in sorted(entries)[:count]:
                pruned[i, j] = True
        for j in range(start, end):
            if n_of_m is not None and (j - start) % n_of_m[1] == 0:
                for i in range(rows):
                    group = range(j, j + n_of_m[1])
                    order = sorted(
                        group, key=lambda c: weight[i, c].item() ** 2 / inverses[c][0, 0].item()
                    )
                    for c in order[: n_of_m[1] - n_of_m[0]]:
                        pruned[i, c] = True
            for i in range(rows):
                if pruned[i, j]:
                    weight[i, j:] -= weight[i, j] / inverses[j][0, 0] * inverses[j][0]
                    weight[i, j] = 0.0
    return weight, pruned


@pytest.mark.parametrize("block_size", [8, 12, 128])
@pytest.mark.parametrize(
    ("sparsity", "n_of_m"),
    [(0.0, None), (0.29, None), (0.5, None), (0.9, None), (0.5, (2, 4)), (0.75, (1, 4))],
)
def test_equals_the_paper(sparsity, n_of_m, block_size):
    weight, inputs = layer()
    gram = add_gram(add_gram(None, inputs[:70]), inputs[70:])
    before = weight.clone()
    found = sparsegpt(
        weight,
        inverse_factor(gram, damping=DAMPING),
        sparsity=sparsity,
        n_of_m=n_of_m,
        block_size=block_size,
    )
    wanted, pruned = naive(weight, inputs, sparsity, n_of_m, block_size)
    assert weight.equal(before)
    assert found.eq(0).equal(pruned)
    torch.testing.assert_close(found, wanted.float(), rtol=1e-3, atol=1e-4)


def test_factor_holds_the_inverse_over_the_columns_that_follow():
    _, inputs = layer()
    gram = inputs.double().T @ inputs.double()
    factor = inverse_factor(gram, damping=DAMPING)
    damped = gram + DAMPING * gram.diagonal().mean() * torch.eye(24, dtype=torch.float64)
    assert factor.equal(factor.triu())
    for j in range(24):
        row = torch.linalg.inv(damped[j:, j:])[0]
        torch.testing.assert_close(factor[j, j] * factor[j, j:], row, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("width", [COLUMNS - 1, COLUMNS, 2 * COLUMNS + 50])
def test_what_is_worked_on_in_parts_is_whole(width):
    inputs = layer(width=width, positions=2 * width)[1].double()
    gram = add_gram(add_gram(None, inputs[:70]), inputs[70:])
    torch.testing.assert_close(gram, inputs.T @ inputs)
    factor = inverse_factor(gram, damping=DAMPING)
    damped = gram + DAMPING * gram.diagonal().mean() * torch.eye(width, dtype=torch.float64)
    assert factor.equal(factor.triu())
    torch.testing.assert_close(factor @ damped @ factor.T, torch.eye(width, dtype=torch.float64))


def test_double_precision_where_single_does_not_suffice():
    gram = add_gram(None, torch.arange(1.0, 25.0)[None])  # of rank one, and exact in both
    damped = gram + 1e-8 * gram.diagonal().mean() * torch.eye(24)
    assert torch.linalg.cholesky_ex(damped).info.item()
    factor = inverse_factor(gram, damping=1e-8)
    wanted = inverse_factor(gram.double(), damping=1e-8)
    assert factor.dtype == torch.float32
    torch.testing.assert_close(factor, wanted.float())


@pytest.mark.parametrize("sparsity", [0.0, 0.01, 0.29, 0.57, 0.999])
def test_count_is_exact(sparsity):
    weight, inputs = layer(rows=7, width=30)
    found = sparsegpt(weight, inverse_factor(add_gram(None, inputs)), sparsity=sparsity, block_size=16)
    assert int((found == 0).sum()) == round(sparsity * 210)


def test_the_update_is_worth_it():
    weight, inputs = layer()
    factor = inverse_factor(add_gram(None, inputs))
    found = sparsegpt(weight, factor, sparsity=0.5)
    masked = weight * (found != 0)
    assert (inputs @ (found - weight).T).norm() < 0.8 * (inputs @ (masked - weight).T).norm()


def test_features_that_are_never_seen_are_pruned_first():
    weight, inputs = layer()
    inputs[:, [3, 17]] = 0
    found = sparsegpt(weight, inverse_factor(add_gram(None, inputs)), sparsity=2 / 24, block_size=24)
    assert found.eq(0).all(0).nonzero().flatten().tolist() == [3, 17]
    torch.testing.assert_close(inputs @ found.T, inputs @ weight.T, rtol=1e-4, atol=1e-3)


def test_without_inputs_it_is_magnitude():
    weight, _ = layer()
    found = sparsegpt(weight, inverse_factor(torch.zeros(24, 24)), sparsity=0.5)
    assert weight[found != 0].abs().min() > weight[found == 0].abs().max()
    assert found[found != 0].equal(weight[found != 0])


def test_dependent_inputs_need_damping():
    inputs = torch.ones(50, 24) * 1e3
    with pytest.raises(ValueError, match="raise it"):
        inverse_factor(add_gram(None, inputs), damping=1e-30)
