"""The two numbers of logit distillation, beside the arguments of any Trainer."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from transformers import TrainingArguments


@dataclass
class DistillationArgumentsMixin:
    """`temperature` and `alpha` for any arguments class.

    Put it first: `@dataclass class DistillSFTConfig(DistillationArgumentsMixin, SFTConfig): pass`.
    """

    temperature: float = field(
        default=2.0,
        metadata={
            "help": "Softens both distributions before they are compared; above 0. The loss is "
            "multiplied by its square, so that the gradient keeps its size."
        },
    )
    alpha: float = field(
        default=0.5,
        metadata={
            "help": "Weight of the distillation part of the loss, in [0, 1]; the task's own loss "
            "weighs 1 - alpha."
        },
    )

    def __post_init__(self) -> None:
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ValueError(
                f"`temperature` must be above 0 and finite, got {self.temperature}. 1 compares the "
                "distributions as they are, 2 to 4 are usual."
            )
        if not 0 <= self.alpha <= 1:
            raise ValueError(
                f"`alpha` must be in [0, 1], got {self.alpha}. It is the weight of the distillation "
                "part, 1 - alpha that of the task: 0.5 mixes them evenly."
            )
        super().__post_init__()  # type: ignore[misc]  # of the TrainingArguments it is mixed into


@dataclass
class DistillationArguments(DistillationArgumentsMixin, TrainingArguments):
    """`TrainingArguments` for `DistillationTrainer`."""
