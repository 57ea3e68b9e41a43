"""A teacher's distribution over many classes of which only a few are kept: what it still teaches."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_compress.distillation.divergences import Divergence
from hf_compress.distillation.losses import mixture, precise

_ON_AVERAGE = ("forward_kl", "skew_kl")


@dataclass(frozen=True, kw_only=True)
class Shortlist:
    """A few classes of each item, with the most probable first.

    ids: (items, size), classes in [0, classes). logs: (items, size), the logarithms of their
    probabilities at `temperature`. rest: (items,), see `of`. drawn: whether they were drawn.
    """

    ids: Tensor
    logs: Tensor
    rest: Tensor
    classes: int
    temperature: float
    drawn: bool

    @property
    def shape(self) -> tuple[int, int]:
        """As of the logits that it stands for."""
        return len(self.ids), self.classes

    @property
    def best(self) -> Tensor:
        """The most probable class of each item, (items,)."""
        return self.ids[:, 0]

    def to(self, device: torch.device) -> Shortlist:
        return replace(
            self, ids=self.ids.to(device), logs=self.logs.to(device), rest=self.rest.to(device)
        )

    def __getitem__(self, items: slice) -> Shortlist:
        return replace(self, ids=self.ids[items], logs=self.logs[items], rest=self.rest[items])

    def distance(self, divergence: Divergence, student: Tensor) -> Tensor:
        """Of the student's logits (items, classes) -> (items,), as `Divergence.between_classes`.

        Of the most probable classes: between the distributions over these classes and one more that
        stands for all others, so never more than between the whole ones, and of forward KL the gradient
        of a teacher that shares its rest out as the student does. Of drawn ones: an unbiased estimate.

        Raises ValueError for another temperature than that of the list, and for a divergence that the
        list does not determine.
        """
        if divergence.taught_temperature != self.temperature:
            raise ValueError(
                f"The teacher's probabilities were kept at temperature {self.temperature}, but the "
                f"loss asks for {divergence.taught_temperature}. Set `temperature` (or only "
                f"`teacher_temperature`) to {self.temperature}, or precompute the teacher anew."
            )
        softened = precise(student) / divergence.temperature
        logs = precise(self.logs)
        if self.drawn:
            return self._estimate(divergence, softened, logs)
        named = softened.gather(-1, self.ids)
        others = softened.scatter(-1, self.ids, -torch.inf).logsumexp(-1, keepdim=True)
        theirs = torch.cat([logs, precise(self.rest)[:, None]], dim=-1)
        return divergence.between_distributions(
            F.log_softmax(torch.cat([named, others], dim=-1), dim=-1), F.log_softmax(theirs, dim=-1)
        )

    def _estimate(self, divergence: Divergence, softened: Tensor, logs: Tensor) -> Tensor:
        if divergence.name not in _ON_AVERAGE:
            raise ValueError(
                f"divergence={divergence.name!r} is no mean over the teacher's distribution, so a "
                f"sample does not tell: choose {' or '.join(map(repr, _ON_AVERAGE))}, or precompute "
                "the teacher with what='topk'."
            )
        student = softened.gather(-1, self.ids) - softened.logsumexp(-1, keepdim=True)
        # A class is there if its key is above those of all others but size - 1: with this probability.
        present = -torch.expm1(-torch.exp(logs - precise(self.rest)[:, None]))
        present[:, 0] = 1.0
        surprise = logs - mixture(logs, student, divergence.setting.get("skew", 0.0))
        return divergence.scale() * (logs.exp() / present * surprise).sum(-1)


def distance(divergence: Divergence, student: Tensor, teacher: Tensor | Shortlist) -> Tensor:
    """Between the logits (items, classes) of both, or what was kept of the teacher's: (items,)."""
    if isinstance(teacher, Shortlist):
        return teacher.distance(divergence, student)
    return divergence.between_classes(student, teacher)


def same_class(student: Tensor, teacher: Tensor | Shortlist) -> Tensor:
    """Where both choose the same, bool (items,); logits as in `distance`."""
    best = teacher.best if isinstance(teacher, Shortlist) else teacher.argmax(-1)
    return student.argmax(-1) == best


def most_probable(logits: Tensor, size: int, temperature: float) -> Shortlist:
    """The `size` most probable classes; `rest` is the logarithm of the probability of all others.

    logits: (items, classes), of any float type; size: in [1, classes).
    """
    _check_size(size, 1, logits.shape[-1])
    logs = F.log_softmax(precise(logits) / temperature, dim=-1)
    kept, ids = logs.topk(size)
    rest = logs.scatter(-1, ids, -torch.inf).logsumexp(-1)
    return Shortlist(
        ids=ids,
        logs=kept,
        rest=rest,
        classes=logits.shape[-1],
        temperature=temperature,
        drawn=False,
    )


def draw(logits: Tensor, size: int, temperature: float, generator: torch.Generator) -> Shortlist:
    """The most probable class and `size - 1` others, drawn without replacement with probabilities that
    grow with the teacher's; `rest` is the threshold that their keys passed.

    The estimate is that of papers/2503.16870. Drawn without replacement (papers/1903.06059) no place is
    spent twice on one class, and those that are nearly certain to be drawn add no variance.

    logits: as in `most_probable`; size: in [2, classes); generator: on their device.
    """
    _check_size(size, 2, logits.shape[-1])
    logs = F.log_softmax(precise(logits) / temperature, dim=-1)
    keys = logs - torch.empty_like(logs).exponential_(generator=generator).log()
    keys.scatter_(-1, logs.argmax(-1, keepdim=True), torch.inf)
    ordered, ids = keys.topk(size + 1)
    ids = ids[:, :size]
    return Shortlist(
        ids=ids,
        logs=logs.gather(-1, ids),
        rest=ordered[:, size],
        classes=logits.shape[-1],
        temperature=temperature,
        drawn=True,
    )


def _check_size(size: int, least: int, classes: int) -> None:
    if isinstance(size, bool) or not isinstance(size, int) or not least <= size < classes:
        raise ValueError(
            f"`size` is {size!r}: keep at least {least} and fewer than the {classes} classes of the "
            "teacher, or all of them with what='logits'."
        )
