"""The divergences that a trainer can choose from, between the outputs of each kind of head.

To add one: a function of two distributions in `losses.py`, and a row in `DIVERGENCES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_compress.distillation.features.distances import cosine_distance, mean_squared_error
from hf_compress.distillation.losses import (
    forward_kl,
    generalized_jsd,
    precise,
    reverse_kl,
    skew_kl,
    skew_reverse_kl,
    squared_error,
    symmetric_kl,
    total_variation,
)


@dataclass(frozen=True, kw_only=True)
class Kind:
    """How a divergence is computed.

    distance: of (..., classes) logarithms of probabilities, or of logits where `of_logits`;
    power: of the temperature, which keeps the size of the gradient: 2 where it falls with T^2;
    setting: the name of the number in [0, 1] that it takes, with `default`;
    paper: its number at arXiv;
    yes_no: whether it means something for the logit of a single yes or no.
    """

    distance: Callable[..., Tensor]
    power: int = 2
    setting: str | None = None
    default: float | None = None
    paper: str = "1503.02531"
    of_logits: bool = False
    yes_no: bool = True


DIVERGENCES = {
    "forward_kl": Kind(distance=forward_kl),
    "reverse_kl": Kind(distance=reverse_kl, paper="2306.08543"),
    "symmetric_kl": Kind(distance=symmetric_kl),
    "jsd": Kind(distance=generalized_jsd, setting="beta", default=0.5, paper="2306.13649"),
    "skew_kl": Kind(distance=skew_kl, setting="skew", default=0.1, paper="2402.03898"),
    "skew_reverse_kl": Kind(distance=skew_reverse_kl, setting="skew", default=0.1, paper="2402.03898"),
    "tvd": Kind(distance=total_variation, power=1, paper="2307.15190"),
    "logit_mse": Kind(distance=mean_squared_error, of_logits=True, paper="1312.6184"),
    "cosine": Kind(distance=cosine_distance, power=0, of_logits=True, yes_no=False),
}


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """A distance between softened outputs: T^power * distance(student / T, teacher / T).

    name: one of `DIVERGENCES`. temperature: T, above 0. T^2 (T for "tvd", 1 for "cosine", which does
    not depend on T) keeps the size of the gradient as T grows; scaled=False leaves it out.
    teacher_temperature: another T for the teacher; None is the same. beta: of "jsd" alone, in [0, 1],
    default 0.5. skew: of "skew_kl" and "skew_reverse_kl" alone, in [0, 1), default 0.1.

    Raises ValueError for anything else, and for a `beta` or `skew` that would be ignored.
    """

    name: str = "forward_kl"
    temperature: float = 1.0
    teacher_temperature: float | None = None
    beta: float | None = None
    skew: float | None = None
    scaled: bool = True

    def __post_init__(self) -> None:
        if self.name not in DIVERGENCES:
            raise ValueError(
                f"`divergence` is {self.name!r}; there are {', '.join(map(repr, DIVERGENCES))}."
            )
        for name in ("temperature", "teacher_temperature"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(
                    f"`{name}` must be above 0 and finite, got {value}. 1 compares the distributions "
                    "as they are, 2 to 4 are usual."
                )
        for name, given in (("beta", self.beta), ("skew", self.skew)):
            takers = [key for key, kind in DIVERGENCES.items() if kind.setting == name]
            if given is not None and self.name not in takers:
                raise ValueError(
                    f"`{name}` is {given}, but divergence {self.name!r} has none: leave it out, or "
                    f"choose {' or '.join(map(repr, takers))}."
                )
        if self.beta is not None and not 0 <= self.beta <= 1:
            raise ValueError(f"`beta` must be in [0, 1], got {self.beta}. 0.5 is the plain JSD.")
        if self.skew is not None and not 0 <= self.skew < 1:
            raise ValueError(
                f"`skew` must be in [0, 1), got {self.skew}. 0 is the plain KL, 0.1 usual; at 1 a "
                "distribution would be compared with itself."
            )

    def between_classes(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Of two distributions over classes: (..., classes) logits of any float type -> (...), in fp32
        or better."""
        if self._kind.of_logits:
            return self._distance(*self._softened(student, teacher))
        student, teacher = self._softened(student, teacher)
        return self.between_distributions(
            F.log_softmax(student, dim=-1), F.log_softmax(teacher, dim=-1)
        )

    def between_distributions(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Of logarithms of probabilities that are softened already: (..., classes) -> (...).

        Raises ValueError for a divergence of logits.
        """
        if self._kind.of_logits:
            self._refuse("probabilities", (k for k, v in DIVERGENCES.items() if not v.of_logits))
        return self._distance(student, teacher)

    def between_labels(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Of yes or no, for each label of a multi-label head alone: (...) logits -> (...).

        Raises ValueError for a divergence that needs several classes.
        """
        if not self._kind.yes_no:
            self._refuse("multi-label classification", (k for k, v in DIVERGENCES.items() if v.yes_no))
        student, teacher = self._softened(student, teacher)
        if self._kind.of_logits:
            return self._distance(student[..., None], teacher[..., None])
        return self._distance(_yes_and_no(student), _yes_and_no(teacher))

    def between_numbers(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Of the targets of a regression: (...) -> (...), (student - teacher)^2, which is twice the KL
        of two normal distributions of variance 1, in both directions; there is no temperature.

        Raises ValueError for a divergence that is not that.
        """
        names = ("forward_kl", "reverse_kl", "logit_mse")
        if self.name not in names:
            self._refuse("regression", names)
        return squared_error(student, teacher)

    def merged_classes(self, logits: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """Several teachers as one: the weighted mean of their softened distributions, as logits, or of
        the logits where these are compared. Each (..., classes) -> (..., classes).

        weights: which add up to 1. One teacher is left as it is.
        """
        if len(logits) == 1:
            return logits[0]
        if self._kind.of_logits:
            return self.merged_numbers(logits, weights)
        softened = [F.log_softmax(precise(each) / self.taught_temperature, dim=-1) for each in logits]
        return self.taught_temperature * _log_mean(softened, weights)

    def merged_labels(self, logits: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """As `merged_classes`, of the probability of each yes: (...) -> (...)."""
        if len(logits) == 1:
            return logits[0]
        if self._kind.of_logits:
            return self.merged_numbers(logits, weights)
        softened = [precise(each) / self.taught_temperature for each in logits]
        yes = _log_mean([F.logsigmoid(each) for each in softened], weights)
        no = _log_mean([F.logsigmoid(-each) for each in softened], weights)
        return self.taught_temperature * (yes - no)

    def merged_numbers(self, values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """The weighted mean. Each (...) -> (...)."""
        if len(values) == 1:
            return values[0]
        pairs = zip(values, weights, strict=True)
        return torch.stack([weight * precise(value) for value, weight in pairs]).sum(0)

    def describe(self) -> dict[str, Any]:
        """What a report says of it."""
        described: dict[str, Any] = {"divergence": self.name, "temperature": self.temperature}
        if self.teacher_temperature is not None:
            described["teacher's temperature"] = self.teacher_temperature
        if not self.scaled:
            described["times temperature squared"] = False
        return {**described, **self.setting, "paper": f"arXiv:{self._kind.paper}"}

    @property
    def setting(self) -> dict[str, float]:
        """The `beta` or `skew` that is used, by its name; empty where there is none."""
        kind = self._kind
        if kind.setting is None or kind.default is None:
            return {}
        given = self.beta if kind.setting == "beta" else self.skew
        return {kind.setting: kind.default if given is None else given}

    @property
    def _kind(self) -> Kind:
        return DIVERGENCES[self.name]

    def _softened(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        return precise(student) / self.temperature, precise(teacher) / self.taught_temperature

    @property
    def taught_temperature(self) -> float:
        """Of the teacher's distribution."""
        return self.temperature if self.teacher_temperature is None else self.teacher_temperature

    def scale(self, power: int | None = None) -> float:
        """T^power; by default that of this divergence."""
        power = self._kind.power if power is None else power
        return self.temperature**power if self.scaled else 1.0

    def _distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        return self.scale() * self._kind.distance(student, teacher, **self.setting)

    def _refuse(self, task: str, names: Iterable[str]) -> NoReturn:
        raise ValueError(
            f"divergence={self.name!r} is not defined for {task}; these are: "
            f"{', '.join(map(repr, names))}."
        )


def _log_mean(logarithms: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    pairs = zip(logarithms, weights, strict=True)
    return reduce(torch.logaddexp, [logarithm + math.log(weight) for logarithm, weight in pairs])


def _yes_and_no(logits: Tensor) -> Tensor:
    return torch.stack([F.logsigmoid(logits), F.logsigmoid(-logits)], dim=-1)
