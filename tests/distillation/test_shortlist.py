import math

import pytest
import torch
import torch.nn.functional as F

from hf_compress.distillation.divergences import DIVERGENCES, Divergence
from hf_compress.distillation.shortlist import draw, most_probable

TEACHER = [[4.0, 1.0, 3.0, -2.0, 0.5], [0.0, 0.1, -0.3, 5.0, 2.0]]
STUDENT = [[1.0, 2.0, -1.0, 0.3, 0.2], [0.4, -0.1, 1.0, 3.0, -2.0]]
OF_PROBABILITIES = [name for name, kind in DIVERGENCES.items() if not kind.of_logits]


def logits(values):
    return torch.tensor(values, dtype=torch.float64)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_most_probable_classes_and_the_logarithm_of_the_rest():
    kept = most_probable(logits([[math.log(x) for x in (0.1, 0.4, 0.2, 0.3)]]), 2, 1.0)
    assert kept.ids.tolist() == [[1, 3]]
    torch.testing.assert_close(kept.logs.exp(), logits([[0.4, 0.3]]))
    torch.testing.assert_close(kept.rest.exp(), logits([0.3]))
    assert kept.best.tolist() == [1]


def test_forward_kl_by_hand():
    """Of 0.5, 0.3 and a rest of 0.2, to 0.25, 0.25 and a rest of 0.5."""
    teacher = most_probable(logits([[math.log(x) for x in (0.5, 0.3, 0.15, 0.05)]]), 2, 1.0)
    student = torch.log(logits([[0.25, 0.25, 0.25, 0.25]]))
    expected = 0.5 * math.log(2) + 0.3 * math.log(0.3 / 0.25) + 0.2 * math.log(0.2 / 0.5)
    assert teacher.distance(Divergence(), student).item() == pytest.approx(expected)


@pytest.mark.parametrize("name", OF_PROBABILITIES)
def test_the_other_classes_count_as_one(name):
    """Whatever the divergence, it is that of distributions in which they are one class."""
    divergence = Divergence(name=name, temperature=2.0)
    teacher, student = logits(TEACHER), logits(STUDENT)
    kept = most_probable(teacher, 3, 2.0)

    def merged(values):
        # Row by row in probabilities, then as logits that temperature 2 turns into these again.
        rows = []
        for row, ids in zip(F.softmax(values / 2, -1), kept.ids.tolist(), strict=True):
            others = [i for i in range(5) if i not in ids]
            rows.append([*row[ids].tolist(), row[others].sum().item()])
        return 2 * torch.log(logits(rows))

    expected = divergence.between_classes(merged(student), merged(teacher))
    torch.testing.assert_close(kept.distance(divergence, student), expected)


def test_without_the_square_of_the_temperature():
    scaled, plain = (Divergence(temperature=2.0, scaled=scaled) for scaled in (True, False))
    teacher, student = logits(TEACHER), logits(STUDENT)
    for kept in (most_probable(teacher, 3, 2.0), draw(teacher, 3, 2.0, generator(0))):
        torch.testing.assert_close(kept.distance(scaled, student), 4 * kept.distance(plain, student))


def test_never_more_than_between_the_whole_distributions():
    torch.manual_seed(0)
    teacher, student = 3 * torch.randn(50, 30), 3 * torch.randn(50, 30)
    whole = Divergence().between_classes(student, teacher)
    last = torch.zeros(50)
    for size in (1, 5, 20, 29):
        distance = most_probable(teacher, size, 1.0).distance(Divergence(), student)
        assert (distance <= whole + 1e-5).all()
        assert (distance >= last - 1e-5).all()
        last = distance
    torch.testing.assert_close(last, whole)  # one class left is no rest


def test_the_gradient_is_that_of_a_teacher_who_shares_out_the_rest_as_the_student_does():
    teacher = logits(TEACHER)
    student = logits(STUDENT).requires_grad_()
    kept = most_probable(teacher, 2, 1.0)
    kept.distance(Divergence(), student).sum().backward()
    ours, target = F.softmax(student.detach(), -1), F.softmax(teacher, -1)
    for row, ids in enumerate(kept.ids.tolist()):
        others = [i for i in range(5) if i not in ids]
        share = ours[row, others] / ours[row, others].sum()
        target[row, others] = target[row, others].sum() * share
    torch.testing.assert_close(student.grad, ours - target)


def test_a_student_that_all_but_rules_the_rest_out_has_a_finite_gradient():
    student = torch.tensor([[60.0, 59.0, -80.0, -90.0]], requires_grad=True)
    kept = most_probable(torch.tensor([[2.0, 1.0, 0.0, 0.0]]), 2, 1.0)
    kept.distance(Divergence(), student).sum().backward()
    rest = kept.rest.exp().item()
    # What the others lack falls to the likelier of them.
    torch.testing.assert_close(student.grad[0, 2:], torch.tensor([-rest, 0.0]), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize(
    "divergence", [Divergence(temperature=2.0), Divergence(name="skew_kl", temperature=2.0)]
)
def test_a_draw_estimates_value_and_gradient_without_bias(divergence, size):
    draws = 40_000
    teacher = logits(TEACHER[:1])
    student = logits(STUDENT[:1]).requires_grad_()
    (expected,) = torch.autograd.grad(divergence.between_classes(student, teacher).sum(), student)
    value = divergence.between_classes(student, teacher).item()

    drawn = draw(teacher.expand(draws, -1), size, 2.0, generator())
    many = student.detach().expand(draws, -1).clone().requires_grad_()
    estimates = drawn.distance(divergence, many)
    (gradients,) = torch.autograd.grad(estimates.sum(), many)

    error = estimates.std().item() / math.sqrt(draws)
    assert estimates.mean().item() == pytest.approx(value, abs=4 * error + 1e-9)
    errors = gradients.std(0) / math.sqrt(draws)
    assert ((gradients.mean(0) - expected[0]).abs() <= 4 * errors + 1e-9).all()
    assert error > 0
    assert (drawn.best == teacher.argmax()).all()


def test_of_a_flat_distribution_over_many_classes_too():
    """Where each is drawn rarely, rounding of the keys must not add up."""
    torch.manual_seed(0)
    teacher, student = torch.randn(5000), torch.randn(5000)
    expected = Divergence(temperature=4.0).between_classes(student, teacher).item()
    drawn = draw(teacher.expand(4000, -1), 22, 4.0, generator())
    estimates = drawn.distance(Divergence(temperature=4.0), student.expand(4000, -1))
    error = estimates.std().item() / math.sqrt(4000)
    assert error < 0.03 * expected
    assert estimates.mean().item() == pytest.approx(expected, abs=4 * error)


def test_a_draw_varies_less_than_one_with_replacement():
    """The gradient of papers/2503.16870 from as many classes as are kept here."""
    torch.manual_seed(0)
    teacher = 4 * torch.randn(400, 1000)
    size, probabilities = 20, F.softmax(teacher, -1)
    drawn = draw(teacher, size, 1.0, generator())
    logs = torch.log_softmax(teacher, -1)
    present = 1 - torch.exp(-torch.exp(logs - drawn.rest[:, None]))
    present.scatter_(-1, drawn.best[:, None], 1.0)
    there = torch.zeros_like(teacher).scatter(-1, drawn.ids, 1.0) == 1
    weights = torch.where(there, probabilities / present, 0.0)
    ours = (weights - probabilities).square().sum(-1).mean()
    times = torch.multinomial(probabilities, 60, replacement=True, generator=generator())
    counts = torch.zeros_like(teacher).scatter_add(-1, times, torch.ones(400, 60)) / 60
    theirs = (counts - probabilities).square().sum(-1).mean()
    assert (counts > 0).sum(-1).float().mean() < size
    assert ours < 0.5 * theirs


def test_halves_are_accurate_enough():
    torch.manual_seed(0)
    teacher, student = 3 * torch.randn(2000, 500), 3 * torch.randn(2000, 500)
    for kept in (most_probable(teacher, 20, 2.0), draw(teacher, 20, 2.0, generator())):
        exact = kept.distance(Divergence(temperature=2.0), student)
        half = type(kept)(
            **{**vars(kept), "logs": kept.logs.half(), "rest": kept.rest.half()}
        ).distance(Divergence(temperature=2.0), student)
        assert half.mean().item() == pytest.approx(exact.mean().item(), rel=1e-3)
        torch.testing.assert_close(half, exact, rtol=2e-2, atol=2e-2)


def test_the_same_distribution_costs_nothing():
    teacher = logits(TEACHER)
    for kept in (most_probable(teacher, 2, 1.0), draw(teacher, 2, 1.0, generator())):
        torch.testing.assert_close(kept.distance(Divergence(), teacher + 7.0), logits([0.0, 0.0]))


def test_a_teacher_temperature_of_its_own():
    divergence = Divergence(temperature=3.0, teacher_temperature=1.0)
    kept = most_probable(logits(TEACHER), 4, 1.0)
    expected = divergence.between_classes(logits(STUDENT), logits(TEACHER))
    torch.testing.assert_close(kept.distance(divergence, logits(STUDENT)), expected)


def test_what_does_not_fit_is_refused():
    teacher, student = logits(TEACHER), logits(STUDENT)
    for size in (0, 5, True, 2.0):
        with pytest.raises(ValueError, match=r"`size` is .*at least 1 .* the 5 classes"):
            most_probable(teacher, size, 1.0)
    for size in (1, 5, True, 2.0):
        with pytest.raises(ValueError, match=r"`size` is .*at least 2 .* the 5 classes"):
            draw(teacher, size, 1.0, generator())
    kept, drawn = most_probable(teacher, 2, 1.0), draw(teacher, 2, 1.0, generator())
    with pytest.raises(ValueError, match=r"kept at temperature 1.0, but the loss asks for 2.0"):
        kept.distance(Divergence(temperature=2.0), student)
    with pytest.raises(ValueError, match=r"'cosine' is not defined for probabilities"):
        kept.distance(Divergence(name="cosine"), student)
    with pytest.raises(ValueError, match=r"'jsd' is no mean over the teacher's .*what='topk'"):
        drawn.distance(Divergence(name="jsd"), student)
