"""How the loss of each item changes with the student's logits, in as little memory as can be."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_compress.distillation.divergences import Divergence
from hf_compress.distillation.shortlist import Shortlist, distance


def cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """-log p(label), and its slope p - 1(label).

    logits: (items, classes); labels: (items,). Returns (items,) and (items, classes).
    """
    logs = F.log_softmax(logits, dim=-1)
    chosen = labels[:, None]
    value = -logs.gather(-1, chosen)[:, 0]
    slope = logs.exp_()
    return value, slope.scatter_add_(-1, chosen, slope.new_full(chosen.shape, -1.0))


def between_classes(
    divergence: Divergence, student: Tensor, teacher: Tensor | Shortlist
) -> tuple[Tensor, Tensor]:
    """The `distance` of both, and its slope, by autograd where there is no closed form here.

    student, teacher: (items, classes) logits in fp32 or better, the teacher's also a shortlist of them;
    its logits are overwritten.
    Returns (items,) and (items, classes).
    """
    closed_form = CLOSED_FORMS.get(divergence.name)
    if closed_form is None or isinstance(teacher, Shortlist):
        with torch.enable_grad():
            student = student.detach().requires_grad_()
            value = distance(divergence, student, teacher)
            (slope,) = torch.autograd.grad(value.sum(), student)
        return value.detach(), slope
    ours = _distribution_(student / divergence.temperature)
    theirs = _distribution_(teacher.div_(divergence.taught_temperature))
    value, slope = closed_form(*ours, *theirs, **divergence.setting)
    # Along the logits themselves, which were softened.
    return value * divergence.scale(), slope.mul_(divergence.scale() / divergence.temperature)


def _distribution_(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities, and their logarithms, which overwrite `logits`."""
    probabilities = F.softmax(logits, dim=-1)
    # Of the largest alone the logarithm is exact, however small the others are.
    total = logits.amax(-1, keepdim=True) - probabilities.amax(-1, keepdim=True).log_()
    return probabilities, logits.sub_(total)


def _forward_kl(
    student: Tensor, ours: Tensor, teacher: Tensor, theirs: Tensor
) -> tuple[Tensor, Tensor]:
    return _expected_(teacher, theirs.sub_(ours)), student.sub_(teacher)


def _reverse_kl(
    student: Tensor, ours: Tensor, teacher: Tensor, theirs: Tensor
) -> tuple[Tensor, Tensor]:
    surprise = ours.sub_(theirs)
    value = _expected_(student, surprise)
    return value, surprise.sub_(value[:, None]).mul_(student)


def _jsd(
    student: Tensor, ours: Tensor, teacher: Tensor, theirs: Tensor, beta: float
) -> tuple[Tensor, Tensor]:
    if beta == 0:
        return _forward_kl(student, ours, teacher, theirs)
    if beta == 1:
        return _reverse_kl(student, ours, teacher, theirs)
    mixture = teacher.lerp(student, 1 - beta).log_()
    surprise = ours.sub_(mixture)
    value = _expected_(student, surprise)
    slope = surprise.sub_(value[:, None]).mul_(student).mul_(1 - beta)
    return beta * _expected_(teacher, theirs.sub_(mixture)) + (1 - beta) * value, slope


def _expected_(probabilities: Tensor, values: Tensor) -> Tensor:
    """The mean over the classes, (items,); `values` become 0 where the probability is."""
    # 0 * log(0) is 0 here, where floating point says NaN.
    values.masked_fill_(probabilities == 0, 0.0)
    return (probabilities[:, None] @ values[..., None]).flatten()


CLOSED_FORMS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jsd": _jsd,
}
"""By the name of the divergence: the student's probabilities and their logarithms, the teacher's, each
(items, classes) and overwritten, and its setting -> (items,) values, and (items, classes) slopes along
the student's softened logits."""
