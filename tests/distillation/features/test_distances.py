import pytest
import torch
from torch.autograd import gradcheck

from hf_compress.distillation.features.distances import DISTANCES

# student (3, 4), teacher (0, 5): |difference|^2 = 10, norms 5 and 5, product 20
BY_HAND = {"mse": 5.0, "cosine": 1 - 20 / 25, "normalized": 2 * (1 - 20 / 25), "relative": 10 / 25}


@pytest.mark.parametrize("name", DISTANCES)
def test_by_hand(name):
    student, teacher = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 5.0]])
    assert DISTANCES[name](student, teacher).tolist() == pytest.approx([BY_HAND[name]])


@pytest.mark.parametrize("name", DISTANCES)
def test_one_value_for_each_item_and_0_for_equal_ones(name):
    vectors = torch.randn(2, 3, 5)
    distances = DISTANCES[name](vectors, vectors)
    assert distances.shape == (2, 3)
    torch.testing.assert_close(distances, torch.zeros(2, 3), atol=1e-6, rtol=0)
    assert (DISTANCES[name](vectors, torch.randn(2, 3, 5)) > 0).all()


@pytest.mark.parametrize("name", DISTANCES)
def test_gradients(name):
    student = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(4, 5, dtype=torch.float64)
    assert gradcheck(lambda values: DISTANCES[name](values, teacher), student)


@pytest.mark.parametrize("name", ["cosine", "normalized"])
def test_direction_alone_counts(name):
    student, teacher = torch.randn(2, 5), torch.randn(2, 5)
    torch.testing.assert_close(
        DISTANCES[name](3 * student, teacher), DISTANCES[name](student, 7 * teacher)
    )


def test_relative_does_not_depend_on_the_unit():
    student, teacher = torch.randn(2, 5), torch.randn(2, 5)
    one, other = (DISTANCES["relative"](c * student, c * teacher) for c in (1.0, 100.0))
    torch.testing.assert_close(one, other)
    assert DISTANCES["relative"](student, torch.zeros(2, 5)).isfinite().all()
