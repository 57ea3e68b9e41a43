"""What one item costs: distances between a student's and a teacher's logits.

Every function returns one value per item and never a mean: how many items there are in the whole
accumulated batch, over all processes, is known in one place only, the trainer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def kl_divergence(student: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    """T^2 * KL(softmax(teacher / T) || softmax(student / T)) of each item (papers/1503.02531).

    student, teacher: (..., classes) logits of any float type; the work is done in fp32 or better.
    temperature: > 0. T^2 is part of the value, so that the gradient keeps its size as T grows: for
    large T it tends to the centred difference of the logits divided by the number of classes.
    Returns (...), >= 0 up to rounding. A class of teacher logit -inf costs nothing.
    """
    student_log = F.log_softmax(_precise(student) / temperature, dim=-1)
    teacher_log = F.log_softmax(_precise(teacher) / temperature, dim=-1)
    teacher_probability = teacher_log.exp()
    # 0 * log(0) is 0 here, where floating point says NaN.
    surprise = (teacher_log - student_log).masked_fill(teacher_probability == 0, 0.0)
    return temperature**2 * (teacher_probability * surprise).sum(-1)


def bernoulli_kl_divergence(student: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    """T^2 * KL between two yes/no distributions given by their logits: one label of a multi-label head.

    student, teacher: (...) logits, each an item of its own. Returns (...), >= 0 up to rounding.
    """
    student, teacher = _precise(student) / temperature, _precise(teacher) / temperature
    yes = torch.sigmoid(teacher) * (F.logsigmoid(teacher) - F.logsigmoid(student))
    no = torch.sigmoid(-teacher) * (F.logsigmoid(-teacher) - F.logsigmoid(-student))
    return temperature**2 * (yes + no)


def squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    """(student - teacher)^2 of each item, for regression. student, teacher: (...). Returns (...)."""
    return (_precise(student) - _precise(teacher)) ** 2


def _precise(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
