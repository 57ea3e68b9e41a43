import math

import pytest
import torch

from hf_compress.distillation.divergences import Divergence
from hf_compress.distillation.translation.distances import (
    between_likelihoods,
    likelihoods,
    sorted_distance,
)


def logs(*rows):
    return torch.tensor(rows, dtype=torch.float64).log()


def test_sorted_distance_by_hand():
    """0.7 0.2 0.1 against 0.6 0.4: |0.1| + |-0.2| + |0.1|."""
    student, teacher = logs([0.1, 0.7, 0.2]), logs([0.4, 0.6])
    assert sorted_distance(student, teacher).tolist() == pytest.approx([0.4])
    assert sorted_distance(teacher, student).tolist() == pytest.approx([0.4])


def test_sorted_distance_is_the_transport_at_equal_costs():
    """Of all ways to pair the classes the sorted one is the cheapest: tried out."""
    from itertools import permutations

    student, teacher = (torch.randn(5, 4, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    paired = torch.stack(
        [
            (student.exp() - teacher.exp()[:, list(order)]).abs().sum(-1)
            for order in permutations(range(4))
        ]
    )
    torch.testing.assert_close(sorted_distance(student, teacher), paired.min(0).values)


def test_sorted_distance_ends():
    sure, other = logs([1.0, 0.0, 0.0]), logs([0.0, 1.0])
    assert sorted_distance(sure, other).item() == 0
    flat = torch.full((1, 1000), -math.log(1000), dtype=torch.float64)
    assert sorted_distance(sure, flat).item() == pytest.approx(2 - 2 / 1000)


def test_likelihoods_by_hand():
    """Spans (a b), (c), none, with tokens of probability 1/2, 1/4 and 1/8."""
    probabilities = torch.tensor([[0.5, 0.5, 0.0], [0.25, 0.25, 0.5], [0.125, 0.375, 0.5]])
    found = likelihoods(
        probabilities.log() + 3.0, torch.tensor([1, 0, 0]), torch.tensor([0, 0, 1]), count=3
    )
    assert found.tolist() == pytest.approx([math.log(1 / 8), math.log(1 / 8), 0.0])


def test_between_likelihoods_by_hand():
    """Forward KL of yes or no at T 2: 4 (0.5 log(0.5/0.25) + 0.5 log(0.5/0.75))."""
    found = between_likelihoods(Divergence(temperature=2.0), logs([0.25])[0], logs([0.5])[0])
    expected = 4 * (0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75))
    assert found.tolist() == pytest.approx([expected])


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd", "tvd"])
def test_between_likelihoods_has_the_right_gradient(name):
    student = torch.tensor([-3.0, -0.5, -1e-3], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([-1.0, -2.0, -5.0], dtype=torch.float64)
    divergence = Divergence(name=name)
    assert torch.autograd.gradcheck(lambda s: between_likelihoods(divergence, s, teacher), student)


def test_certainty_is_finite():
    student = torch.zeros(2, requires_grad=True)
    distance = between_likelihoods(Divergence(), student, torch.tensor([0.0, -1.0]))
    distance.sum().backward()
    assert torch.isfinite(distance).all()
    assert torch.isfinite(student.grad).all()


def test_logits_cannot_be_compared():
    with pytest.raises(ValueError, match="not defined for probabilities"):
        between_likelihoods(Divergence(name="cosine"), torch.tensor([-1.0]), torch.tensor([-1.0]))
