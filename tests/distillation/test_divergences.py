"""The divergences as the trainer uses them: on logits, softened, for each kind of head."""

import pytest
import torch

from hf_compress.distillation.divergences import DIVERGENCES, Divergence
from hf_compress.distillation.losses import forward_kl

SMOOTH = [name for name in DIVERGENCES if name != "tvd"]
YES_OR_NO = [name for name in DIVERGENCES if name != "cosine"]


def logits(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_both_temperatures_soften_and_the_students_squared_multiplies():
    student, teacher = logits(5, 7), logits(5, 7, seed=1)
    value = Divergence(temperature=3.0).between_classes(student, teacher)
    expected = forward_kl((student / 3).log_softmax(-1), (teacher / 3).log_softmax(-1))
    torch.testing.assert_close(value, 9 * expected)
    value = Divergence(temperature=3.0, teacher_temperature=2.0).between_classes(student, teacher)
    expected = forward_kl((student / 3).log_softmax(-1), (teacher / 2).log_softmax(-1))
    torch.testing.assert_close(value, 9 * expected)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_square_of_the_temperature_can_be_left_out(name):
    student, teacher = logits(5, 7), logits(5, 7, seed=1)
    scaled, plain = (
        Divergence(name=name, temperature=3.0, scaled=scaled).between_classes(student, teacher)
        for scaled in (True, False)
    )
    torch.testing.assert_close(scaled, {"tvd": 3, "cosine": 1}.get(name, 9) * plain)
    assert "times temperature squared" in Divergence(scaled=False).describe()


@pytest.mark.parametrize(
    ("settings", "used"),
    [
        ({"name": "jsd"}, {"beta": 0.5}),
        ({"name": "jsd", "beta": 0.0}, {"beta": 0.0}),
        ({"name": "skew_kl"}, {"skew": 0.1}),
        ({"name": "skew_reverse_kl", "skew": 0.3}, {"skew": 0.3}),
        ({"name": "tvd"}, {}),
    ],
)
def test_what_is_left_out_has_the_default_of_its_paper(settings, used):
    assert Divergence(**settings).setting == used


def test_logits_by_hand():
    student, teacher = torch.tensor([[3.0, 4.0]]), torch.tensor([[4.0, 3.0]])
    squared = Divergence(name="logit_mse", temperature=2.0)
    assert squared.between_classes(student, teacher) == 1.0  # whatever the temperature
    assert squared.between_labels(student, teacher).tolist() == [[1.0, 1.0]]
    halved = Divergence(name="logit_mse", temperature=2.0, teacher_temperature=1.0)
    assert halved.between_classes(student, teacher) == (25 + 4) / 2
    cosine = Divergence(name="cosine", temperature=2.0).between_classes(student, teacher)
    torch.testing.assert_close(cosine, torch.tensor([1 - 24 / 25]))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_gradients_equal_finite_differences(name, temperature):
    divergence = Divergence(name=name, temperature=temperature, teacher_temperature=1.5)
    student, teacher = logits(3, 4).requires_grad_(), logits(3, 4, seed=1)
    assert torch.autograd.gradcheck(lambda s: divergence.between_classes(s, teacher), student)
    if name in YES_OR_NO:
        assert torch.autograd.gradcheck(lambda s: divergence.between_labels(s, teacher), student)


@pytest.mark.parametrize("name", YES_OR_NO)
def test_a_yes_or_no_is_a_distribution_over_two_classes(name):
    divergence = Divergence(name=name, temperature=2.0)
    student, teacher = logits(6), logits(6, seed=1)
    if name == "logit_mse":
        expected = (student - teacher).square()
    else:
        two = [torch.stack([value, torch.zeros_like(value)], -1) for value in (student, teacher)]
        expected = divergence.between_classes(*two)
    torch.testing.assert_close(divergence.between_labels(student, teacher), expected)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_size_of_the_gradient_of_hot_distributions_does_not_depend_on_the_temperature(name):
    student, teacher = logits(50, 4).requires_grad_(), logits(50, 4, seed=1)
    norms = []
    for temperature in (1e3, 1e5):
        value = Divergence(name=name, temperature=temperature).between_classes(student, teacher).sum()
        norms.append(torch.autograd.grad(value, student)[0].norm())
    torch.testing.assert_close(norms[0], norms[1], rtol=0.01, atol=0)
    assert norms[0] > 0.1


def test_the_gradient_of_the_hot_kl_is_the_centred_difference_of_the_logits():
    student, teacher = logits(3, 4).requires_grad_(), logits(3, 4, seed=1)
    difference = student - teacher
    limit = (difference - difference.mean(-1, keepdim=True)) / 4
    value = Divergence(temperature=1e4).between_classes(student, teacher).sum()
    (gradient,) = torch.autograd.grad(value, student)
    torch.testing.assert_close(gradient, limit.detach(), rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_zero_for_equal_logits_and_never_negative(name):
    divergence = Divergence(name=name, temperature=2.0)
    student, teacher = logits(50, 4, dtype=torch.float32), logits(50, 4, seed=1, dtype=torch.float32)
    assert divergence.between_classes(student, student).abs().max() < 1e-6
    assert (divergence.between_classes(student, teacher) > 0).all()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_half_precision_logits_are_compared_in_single_precision(name):
    divergence = Divergence(name=name, temperature=2.0)
    student, teacher = logits(8, 16).bfloat16(), logits(8, 16, seed=1).bfloat16()
    value = divergence.between_classes(student, teacher)
    assert value.dtype == torch.float32
    assert torch.equal(value, divergence.between_classes(student.float(), teacher.float()))


@pytest.mark.parametrize("name", DIVERGENCES)
def test_extreme_logits_stay_finite(name):
    divergence = Divergence(name=name)
    student = torch.tensor([[200.0, -200.0]], requires_grad=True)
    value = divergence.between_classes(student, -student.detach()).sum()
    if name in YES_OR_NO:
        value = value + divergence.between_labels(student, -student.detach()).sum()
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(student.grad).all()


def test_what_is_not_defined_is_refused():
    value = torch.zeros(3)
    with pytest.raises(ValueError, match="'cosine' is not defined for multi-label.*'tvd', 'logit_mse'"):
        Divergence(name="cosine").between_labels(value, value)
    for name in ("symmetric_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd", "cosine"):
        with pytest.raises(ValueError, match=f"'{name}' is not defined for regression"):
            Divergence(name=name).between_numbers(value, value)
    for name in ("forward_kl", "reverse_kl", "logit_mse"):
        assert (
            Divergence(name=name, temperature=2.0).between_numbers(value, value + 3).tolist() == [9] * 3
        )


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_jsd_agrees_with_trl(beta):
    gkd = pytest.importorskip("trl.experimental.gkd")
    student, teacher = logits(2, 5, 7).requires_grad_(), logits(2, 5, 7, seed=1)
    labels = torch.tensor([[-100, 1, 2, 3, -100], [0, 1, -100, 2, 3]])
    temperature = 1.7
    theirs = gkd.GKDTrainer.generalized_jsd_loss(
        student, teacher, labels=labels, beta=beta, temperature=temperature, num_items_in_batch=7
    )
    counts = labels != -100
    divergence = Divergence(name="jsd", beta=beta, temperature=temperature)
    ours = divergence.between_classes(student[counts], teacher[counts]).sum() / 7
    torch.testing.assert_close(ours, temperature**2 * theirs)  # trl leaves out the factor
    gradients = [torch.autograd.grad(value, student)[0] for value in (ours, temperature**2 * theirs)]
    torch.testing.assert_close(*gradients)
