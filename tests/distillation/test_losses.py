import math

import pytest
import torch
import torch.nn.functional as F

from hf_compress.distillation.losses import (
    bernoulli_kl_divergence,
    kl_divergence,
    squared_error,
)


def test_kl_of_two_known_distributions():
    # teacher (1/2, 1/2), student (1/4, 3/4): 1/2 log 2 + 1/2 log 2/3
    student = torch.tensor([[0.25, 0.75]]).log()
    teacher = torch.tensor([[0.5, 0.5]]).log()
    expected = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    value = kl_divergence(student, teacher, temperature=1.0)
    torch.testing.assert_close(value, torch.tensor([expected]))


def test_kl_is_per_item_and_from_the_teacher_to_the_student():
    student, teacher = torch.randn(2, 5, 7), torch.randn(2, 5, 7)
    value = kl_divergence(student, teacher, temperature=3.0)
    expected = F.kl_div((student / 3).log_softmax(-1), (teacher / 3).softmax(-1), reduction="none").sum(
        -1
    )
    torch.testing.assert_close(value, 9 * expected)
    assert not torch.allclose(value, kl_divergence(teacher, student, temperature=3.0))


def test_bernoulli_kl_of_two_known_distributions():
    # teacher 1/2, student 1/4, as in the two-class case above
    student, teacher = torch.tensor([0.25]).logit(), torch.tensor([0.5]).logit()
    expected = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    value = bernoulli_kl_divergence(student, teacher, temperature=1.0)
    torch.testing.assert_close(value, torch.tensor([expected]))


def test_bernoulli_kl_is_the_two_class_kl():
    student, teacher = torch.randn(6), torch.randn(6)
    two = [torch.stack([logit, torch.zeros(6)], -1) for logit in (student, teacher)]
    torch.testing.assert_close(
        bernoulli_kl_divergence(student, teacher, temperature=2.0),
        kl_divergence(*two, temperature=2.0),
    )


def test_squared_error_by_hand():
    value = squared_error(torch.tensor([1.0, -1.0]), torch.tensor([3.0, -1.5]))
    torch.testing.assert_close(value, torch.tensor([4.0, 0.25]))


@pytest.mark.parametrize("loss", [kl_divergence, bernoulli_kl_divergence])
def test_zero_for_equal_logits_and_never_negative(loss):
    logits = torch.randn(50, 4)
    assert loss(logits, logits, temperature=2.0).abs().max() == 0
    assert (loss(logits, torch.randn(50, 4), temperature=2.0) > -1e-6).all()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("loss", [kl_divergence, bernoulli_kl_divergence])
def test_gradient_equals_finite_differences_of_the_value(loss, temperature):
    student = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(3, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher, temperature=temperature), student)


def test_temperature_squared_is_in_the_gradient():
    student = torch.randn(3, 4, requires_grad=True)
    teacher = torch.randn(3, 4)
    (gradient,) = torch.autograd.grad(kl_divergence(student, teacher, temperature=5.0).sum(), student)
    # d/ds KL(p || softmax(s / T)) = (softmax(s / T) - p) / T, here times T^2
    expected = 5 * ((student / 5).softmax(-1) - (teacher / 5).softmax(-1))
    torch.testing.assert_close(gradient, expected)


def test_gradient_of_hot_distributions_does_not_depend_on_the_temperature():
    student = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(3, 4, dtype=torch.float64)
    difference = student - teacher
    limit = (difference - difference.mean(-1, keepdim=True)) / 4
    for temperature in (1e3, 1e4):
        (gradient,) = torch.autograd.grad(
            kl_divergence(student, teacher, temperature=temperature).sum(), student
        )
        torch.testing.assert_close(gradient, limit.detach(), rtol=0, atol=2 / temperature)


@pytest.mark.parametrize("loss", [kl_divergence, bernoulli_kl_divergence])
def test_half_precision_logits_are_compared_in_single_precision(loss):
    student, teacher = torch.randn(8, 16).bfloat16(), torch.randn(8, 16).bfloat16()
    value = loss(student, teacher, temperature=2.0)
    assert value.dtype == torch.float32
    torch.testing.assert_close(
        value, loss(student.float(), teacher.float(), temperature=2.0), rtol=0, atol=0
    )


def test_a_class_ruled_out_by_both_models_costs_nothing():
    student = torch.tensor([[0.25, 0.75, 0.0]]).log().requires_grad_()
    teacher = torch.tensor([[0.5, 0.5, 0.0]]).log()
    value = kl_divergence(student, teacher, temperature=1.0)
    value.sum().backward()
    expected = kl_divergence(student[:, :2], teacher[:, :2], temperature=1.0)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(student.grad, torch.tensor([[-0.25, 0.25, 0.0]]))


@pytest.mark.parametrize("loss", [kl_divergence, bernoulli_kl_divergence])
def test_extreme_logits_stay_finite(loss):
    student = torch.tensor([[200.0, -200.0]], requires_grad=True)
    value = loss(student, -student.detach(), temperature=1.0).sum()
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(student.grad).all()
