"""How the loss of each item changes with the student's logits."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_compress.distillation.divergences import Divergence


def cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """-log p(label), and its slope p - 1(label).

    logits: (items, classes); labels: (items,). Returns (items,) and (items, classes).
    """
    logs = F.log_softmax(logits, dim=-1)
    chosen = labels[:, None]
    value = -logs.gather(-1, chosen)[:, 0]
    slope = logs.exp_()
    return value, slope.scatter_add_(-1, chosen, slope.new_full(chosen.shape, -1.0))


def between_classes(divergence: Divergence, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """`divergence.between_classes`, and its slope, by autograd where there is no closed form here.

    student, teacher: (items, classes) logits in fp32 or better. Returns (items,) and (items, classes).
    """
    closed_form = CLOSED_FORMS.get(divergence.name)
    if closed_form is None:
        with torch.enable_grad():
            student = student.detach().requires_grad_()
            value = divergence.between_classes(student, teacher)
            (slope,) = torch.autograd.grad(value.sum(), student)
        return value.detach(), slope
    ours = F.log_softmax(student / divergence.temperature, dim=-1)
    theirs = F.log_softmax(teacher / divergence.taught_temperature, dim=-1)
    value, slope = closed_form(ours, theirs)
    # T^2, of which one T is that of the softened logits.
    return value * divergence.temperature**2, slope.mul_(divergence.temperature)


def _forward_kl(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    probability = teacher.exp()
    # 0 * log(0) is 0 here, where floating point says NaN.
    surprise = teacher.sub_(student).masked_fill_(probability == 0, 0.0)
    return torch.linalg.vecdot(probability, surprise), student.exp_().sub_(probability)


def _reverse_kl(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    probability = student.exp()
    surprise = student.sub_(teacher).masked_fill_(probability == 0, 0.0)
    value = torch.linalg.vecdot(probability, surprise)
    return value, surprise.sub_(value[:, None]).mul_(probability)


CLOSED_FORMS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
}
"""By the name of the divergence: logarithms of both distributions, (items, classes), which are
overwritten -> (items,) values, and (items, classes) slopes along the student's softened logits."""
