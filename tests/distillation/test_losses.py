"""The distances by hand, by their identities, and by other formulations of them."""

import math

import pytest
import torch
import torch.nn.functional as F

from hf_compress.distillation.losses import (
    forward_kl,
    generalized_jsd,
    reverse_kl,
    skew_kl,
    skew_reverse_kl,
    squared_error,
    symmetric_kl,
    total_variation,
)

# teacher (1/2, 1/2), student (1/4, 3/4)
STUDENT, TEACHER = torch.tensor([[0.25, 0.75]]).log(), torch.tensor([[0.5, 0.5]]).log()
FORWARD = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
REVERSE = 0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2)


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


# m = 1/2 teacher + 1/2 student; m = 1/10 one + 9/10 the other
JSD = 0.5 * kl((0.5, 0.5), (0.375, 0.625)) + 0.5 * kl((0.25, 0.75), (0.375, 0.625))
JSD_FIFTH = 0.2 * kl((0.5, 0.5), (0.3, 0.7)) + 0.8 * kl((0.25, 0.75), (0.3, 0.7))
SKEW = kl((0.5, 0.5), (0.275, 0.725))
SKEW_REVERSE = kl((0.25, 0.75), (0.475, 0.525))


@pytest.mark.parametrize(
    ("loss", "settings", "expected"),
    [
        (forward_kl, (), FORWARD),
        (reverse_kl, (), REVERSE),
        (symmetric_kl, (), FORWARD + REVERSE),
        (generalized_jsd, (0.5,), JSD),
        (generalized_jsd, (0.2,), JSD_FIFTH),
        (skew_kl, (0.1,), SKEW),
        (skew_reverse_kl, (0.1,), SKEW_REVERSE),
        (total_variation, (), 0.25),
    ],
)
def test_two_known_distributions(loss, settings, expected):
    torch.testing.assert_close(loss(STUDENT, TEACHER, *settings), torch.tensor([expected]))


def logs(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(*shape, generator=generator, dtype=torch.float64)).log_softmax(-1)


def test_kl_is_that_of_torch():
    student, teacher = logs(2, 5, 7), logs(2, 5, 7, seed=1)
    expected = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(forward_kl(student, teacher), expected)
    torch.testing.assert_close(reverse_kl(teacher, student), expected)


def test_jsd_divided_by_its_weight_tends_to_the_kl_at_both_ends():
    student, teacher = logs(5, 7), logs(5, 7, seed=1)
    small = 1e-6
    near = {"rtol": 1e-4, "atol": 1e-6}
    forward, reverse = forward_kl(student, teacher), reverse_kl(student, teacher)
    torch.testing.assert_close(generalized_jsd(student, teacher, small) / small, forward, **near)
    torch.testing.assert_close(generalized_jsd(student, teacher, 1 - small) / small, reverse, **near)
    assert torch.equal(generalized_jsd(student, teacher, 0.0), forward)
    assert torch.equal(generalized_jsd(student, teacher, 1.0), reverse)


def test_jsd_is_the_same_seen_from_the_other_side():
    student, teacher = logs(5, 7), logs(5, 7, seed=1)
    torch.testing.assert_close(
        generalized_jsd(student, teacher, 0.3), generalized_jsd(teacher, student, 0.7)
    )
    assert (generalized_jsd(student, teacher, 0.5) <= math.log(2)).all()


@pytest.mark.parametrize("skew", [0.0, 1e-9])
def test_no_skew_is_the_plain_kl(skew):
    student, teacher = logs(5, 7), logs(5, 7, seed=1)
    torch.testing.assert_close(skew_kl(student, teacher, skew), forward_kl(student, teacher))
    torch.testing.assert_close(skew_reverse_kl(student, teacher, skew), reverse_kl(student, teacher))


def test_skew_bounds_the_kl():
    one, other = torch.tensor([[1.0, 0.0]]).log(), torch.tensor([[0.0, 1.0]]).log()
    bound = torch.tensor([math.log(10)])
    torch.testing.assert_close(skew_kl(one, other, 0.1), bound)
    torch.testing.assert_close(skew_reverse_kl(one, other, 0.1), bound)


def test_jeffreys_is_symmetric():
    student, teacher = logs(5, 7), logs(5, 7, seed=1)
    assert torch.equal(symmetric_kl(student, teacher), symmetric_kl(teacher, student))


def test_total_variation_is_bounded_by_1_and_by_pinsker():
    student, teacher = logs(200, 7), logs(200, 7, seed=1)
    value = total_variation(student, teacher)
    assert (value >= 0).all()
    assert (value <= 1).all()
    assert (value <= (forward_kl(student, teacher) / 2).sqrt() + 1e-12).all()
    torch.testing.assert_close(value, total_variation(teacher, student))
    apart = total_variation(torch.tensor([[1.0, 0.0]]).log(), torch.tensor([[0.0, 1.0]]).log())
    assert apart == 1


LOSSES = [
    (forward_kl, ()),
    (reverse_kl, ()),
    (symmetric_kl, ()),
    (generalized_jsd, (0.3,)),
    (skew_kl, (0.1,)),
    (skew_reverse_kl, (0.1,)),
    (total_variation, ()),
]


@pytest.mark.parametrize(("loss", "settings"), LOSSES)
def test_zero_for_equal_distributions_and_never_negative(loss, settings):
    student, teacher = logs(200, 7), logs(200, 7, seed=1)
    assert loss(student, student, *settings).abs().max() < 1e-12
    assert (loss(student, teacher, *settings) > 0).all()


@pytest.mark.parametrize(("loss", "settings"), LOSSES)
def test_a_class_ruled_out_by_both_models_costs_nothing(loss, settings):
    logits = torch.tensor([[0.25, 0.75, 0.0], [0.5, 0.5, 0.0]], dtype=torch.float64).log()
    student, teacher = logits[:1].requires_grad_(), logits[1:]
    value = loss(student.log_softmax(-1), teacher, *settings)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    short = logits[:1, :2].detach().requires_grad_()
    expected = loss(short.log_softmax(-1), teacher[:, :2], *settings)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), short)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient[:, :2], expected_gradient)
    assert gradient[:, 2] == 0


def test_a_class_ruled_out_by_the_student_alone_is_not_hidden():
    one, other = torch.tensor([[1.0, 0.0]]).log(), torch.tensor([[0.5, 0.5]]).log()
    assert forward_kl(one, other) == math.inf
    assert reverse_kl(other, one) == math.inf


def test_squared_error_by_hand():
    value = squared_error(torch.tensor([1.0, -1.0]), torch.tensor([3.0, -1.5]))
    torch.testing.assert_close(value, torch.tensor([4.0, 0.25]))
