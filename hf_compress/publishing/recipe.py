"""How a model was made, asked of the objects that made it."""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from transformers import BitsAndBytesConfig

from hf_compress.publishing.audit import Audit
from hf_compress.publishing.card import hub_id
from hf_compress.publishing.validate import LOCAL_PATH

_TRAINING = (
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "optim",
    "max_grad_norm",
    "bf16",
    "fp16",
    "seed",
)


@runtime_checkable
class Describes(Protocol):
    """A callback that tells what it did.

    `describe()` is JSON-able, with `method` and, where there are any, `paper`, `sparsity`, `weights`
    (fraction of zeros by name of the weight) and `skipped` (reason by name).
    """

    def describe(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Recipe:
    """What `describe()` of the callbacks, the teacher, the arguments and the command line tell."""

    methods: list[dict[str, Any]]
    distillation: dict[str, Any] | None
    training: dict[str, Any] | None
    command: str

    @property
    def targets(self) -> list[str]:
        """Names of the weights that the methods set zeros in."""
        names = (name for method in self.methods for name in method.get("weights", ()))
        return list(dict.fromkeys(names))

    def check(self, found: Audit) -> None:
        """Raises ValueError where the files are denser than the methods were asked for."""
        for method in self.methods:
            weights, asked = method.get("weights", {}), method.get("sparsity")
            if not weights:
                continue
            if isinstance(asked, float | int) and method.get("scope") == "layer":
                for name in weights:
                    found.check([name], asked)
            elif isinstance(asked, float | int):
                found.check(weights, asked)
            for name, fraction in weights.items():
                found.check([name], fraction)


def recipe_of(trainer: Any | None) -> Recipe:
    """The recipe of a trainer; of a bare model (None) only the command is known."""
    command = _command()
    if trainer is None:
        return Recipe([], None, None, command)
    described = [c for c in trainer.callback_handler.callbacks if isinstance(c, Describes)]
    args = trainer.args.to_dict()
    # Either of the two says how long; the other is then no more than a default.
    unused = "num_train_epochs" if trainer.args.max_steps > 0 else "max_steps"
    training = {name: args[name] for name in _TRAINING if name != unused}
    training |= {"steps_done": trainer.state.global_step, "processes": trainer.args.world_size}
    return Recipe(
        methods=[callback.describe() for callback in described],
        distillation=_distillation(trainer),
        training=training,
        command=command,
    )


def teacher_of(trainer: Any | None) -> Any | None:
    """The teacher of a distilling trainer."""
    # Asked of the object: the trainer's class may be one of the user's, mixed with another.
    return None if trainer is None else vars(trainer).get("teacher")


def bits_of(model: Any) -> int | None:
    """8 or 4 for a model packed by bitsandbytes, else None."""
    settings = getattr(model.config, "quantization_config", None)
    if not isinstance(settings, BitsAndBytesConfig):
        return None
    return 8 if settings.load_in_8bit else 4


def precision_of(model: Any) -> str:
    bits = bits_of(model)
    return f"{bits} bit" if bits else str(model.dtype).removeprefix("torch.")


def _distillation(trainer: Any) -> dict[str, Any] | None:
    teacher = teacher_of(trainer)
    if teacher is None:
        return None
    return {
        "teacher": hub_id(teacher.config.name_or_path) or type(teacher).__name__,
        "teacher's precision": precision_of(teacher),
        "temperature": trainer.args.temperature,
        "alpha": trainer.args.alpha,
        "paper": "arXiv:1503.02531",
    }


def _command() -> str:
    """The command line, each absolute path cut to its last part, which is all that concerns others."""
    line = "python " + shlex.join([os.path.basename(sys.argv[0]), *sys.argv[1:]])
    return LOCAL_PATH.sub(lambda path: Path(path[0]).name, line)
