"""The settings of logit distillation, beside the arguments of any Trainer."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from transformers import TrainingArguments

from hf_compress.distillation.divergences import DIVERGENCES, Divergence


@dataclass
class DistillationArgumentsMixin:
    """`temperature`, `alpha` and the divergence for any arguments class.

    Put it first: `@dataclass class DistillSFTConfig(DistillationArgumentsMixin, SFTConfig): pass`.
    """

    temperature: float = field(
        default=2.0,
        metadata={
            "help": "Softens both distributions before they are compared; above 0. The loss is "
            "multiplied by its square, so that the gradient keeps its size (by itself for tvd, not "
            "at all for cosine)."
        },
    )
    temperature_squared: bool = field(
        default=True,
        metadata={
            "help": "Whether the loss is multiplied like that; else it falls with the temperature."
        },
    )
    teacher_temperature: float | None = field(
        default=None,
        metadata={"help": "Another temperature for the teacher's distribution; else the same."},
    )
    alpha: float = field(
        default=0.5,
        metadata={
            "help": "Weight of the distillation part of the loss, in [0, 1]; the task's own loss "
            "weighs 1 - alpha."
        },
    )

    divergence: str = field(
        default="forward_kl",
        metadata={
            "help": "How far the student's distribution is from the teacher's: "
            f"{', '.join(DIVERGENCES)}."
        },
    )
    beta: float | None = field(
        default=None,
        metadata={"help": "jsd: the teacher's share of the mixture, in [0, 1]; by default 0.5."},
    )
    skew: float | None = field(
        default=None,
        metadata={
            "help": "skew_kl, skew_reverse_kl: how much of the first distribution is mixed into the "
            "second, in [0, 1); by default 0.1."
        },
    )
    across_tokenizers: str = field(
        default="likelihood",
        metadata={
            "help": "With a teacher of another tokenizer: 'likelihood' compares how probable both find "
            "the text between common cuts, 'uld' the sorted distributions at its beginning."
        },
    )
    on_policy: float = field(
        default=0.0,
        metadata={
            "help": "Of language models: the part of the steps, in [0, 1], in which the student writes "
            "what it is taught on, from the prompts of the data, and only the teacher judges it."
        },
    )
    on_policy_temperature: float = field(
        default=1.0,
        metadata={"help": "At which it draws its tokens; 0 takes the most probable ones."},
    )
    chunk_size: int | str | None = field(
        default="auto",
        metadata={
            "help": "Of language models, how many tokens have logits at one time: a number, 'auto' for "
            "memory that does not grow with the vocabulary, 'none' for the logits of the whole batch."
        },
    )

    def __post_init__(self) -> None:
        self.make_divergence()  # raises ValueError where its settings are wrong
        self.chunk_size = _as_chunk_size(self.chunk_size)
        if not 0 <= self.alpha <= 1:
            raise ValueError(
                f"`alpha` must be in [0, 1], got {self.alpha}. It is the weight of the distillation "
                "part, 1 - alpha that of the task: 0.5 mixes them evenly."
            )
        if self.across_tokenizers not in ("likelihood", "uld"):
            raise ValueError(
                f"`across_tokenizers` is {self.across_tokenizers!r}: pass 'likelihood' or 'uld'."
            )
        if self.across_tokenizers == "uld" and self.divergence != "forward_kl":
            raise ValueError(
                f"across_tokenizers='uld' is a distance of its own, so divergence={self.divergence!r} "
                "would be ignored: leave it out, or choose across_tokenizers='likelihood'."
            )
        if not 0 <= self.on_policy <= 1:
            raise ValueError(
                f"`on_policy` must be in [0, 1], got {self.on_policy}. It is a part of the steps: 0.5 "
                "for every other one, on average."
            )
        if not 0 <= self.on_policy_temperature < math.inf:
            raise ValueError(
                f"`on_policy_temperature` must be 0 or more, got {self.on_policy_temperature}. 1 draws "
                "from the student's distribution as it is."
            )
        super().__post_init__()  # type: ignore[misc]  # of the TrainingArguments it is mixed into

    def make_divergence(self) -> Divergence:
        """As the settings are now: callbacks may change them in training."""
        return Divergence(
            name=self.divergence,
            temperature=self.temperature,
            teacher_temperature=self.teacher_temperature,
            beta=self.beta,
            skew=self.skew,
            scaled=self.temperature_squared,
        )


@dataclass
class DistillationArguments(DistillationArgumentsMixin, TrainingArguments):
    """`TrainingArguments` for `DistillationTrainer`."""


def _as_chunk_size(given: int | str | None) -> int | str | None:
    if given is None or given == "none":
        return None
    if given == "auto":
        return given
    if str(given).isdecimal() and int(given) > 0:  # a command line gives words
        return int(given)
    raise ValueError(
        f"`chunk_size` is {given!r}: pass a number of tokens, 'auto', or None for whole logits."
    )
