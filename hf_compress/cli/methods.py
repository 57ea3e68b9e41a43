"""From the arguments of `compress` to the callbacks that they describe."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import yaml

from hf_compress.callbacks.masking import MaskingCallback
from hf_compress.callbacks.pruning import PruningCallback
from hf_compress.callbacks.quantization import QuantizationCallback
from hf_compress.callbacks.rigl import RigLCallback
from hf_compress.cli.arguments import CompressArguments, MethodArguments
from hf_compress.distillation.arguments import DistillationArguments
from hf_compress.schedules import Drop

METHODS: dict[str, Callable[..., MaskingCallback]] = {
    "gradual": PruningCallback,
    "rigl": RigLCallback,
    "keep": PruningCallback.keep,
}


def check_methods(arguments: CompressArguments) -> None:
    """Raises ValueError for settings that do not go together, or lack what they are for."""
    few_bits = arguments.bits is not None
    if arguments.teacher is None and arguments.teacher_bits is not None:
        raise ValueError("`teacher_bits` is there, but no `teacher`: pass both or neither.")
    if arguments.teacher == "dense" and arguments.dense_epochs is None:
        raise ValueError("`teacher` is 'dense', but no `dense_epochs` make it: pass both.")
    for name, default in (("group_size", None), ("grid", None), ("format", "dense")):
        if vars(arguments)[name] != default and not few_bits:
            raise ValueError(f"`{name}` is there, but no `bits`: pass both or neither.")
    if arguments.load_bits is None:
        return
    for name in ("bits", "sparsity", "method", "pattern", "student_layers"):
        if vars(arguments)[name] is not None:
            raise ValueError(
                f"`load_bits` freezes the model, so that `{name}` has nothing to train: choose one."
            )
    if not arguments.reads_text:
        raise ValueError("`load_bits` is for tasks of text; for images and sound pass `bits`.")


def quantization_callback(arguments: CompressArguments) -> QuantizationCallback | None:
    """The callback of `bits`; None without them. Raises ValueError for what it refuses."""
    if arguments.bits is None:
        return None
    return QuantizationCallback(
        arguments.bits,
        group_size=arguments.group_size,
        grid=arguments.grid or "mse",
        targets=arguments.targets,
        ignore=arguments.ignore,
    )


def pruning_callback(
    arguments: CompressArguments, training: DistillationArguments
) -> MaskingCallback | None:
    """The callback of `method` with the settings that are given; None where nothing is to be pruned.

    Raises ValueError for settings of another method, for those that the callback refuses, and for a
    drop of a metric that no evaluation will have.
    """
    names = [f.name for f in fields(MethodArguments) if f.name != "method"]
    given = {name: vars(arguments)[name] for name in names if vars(arguments)[name] is not None}
    of_both = {"targets", "ignore"} if arguments.bits is not None else set()
    if arguments.method is None and given.keys() <= of_both:
        return None
    method = arguments.method or "gradual"
    takes = inspect.signature(METHODS[method]).parameters
    if stray := [name for name in given if name not in takes]:
        raise ValueError(
            f"method {method!r} does not take {', '.join(stray)}, only {', '.join(takes)}: leave "
            "out what it does not take, or choose another `method`."
        )
    if method == "rigl" and arguments.sparsity is None:
        raise ValueError("method 'rigl' needs `sparsity`: the fraction of zeros, such as 0.8.")
    for name in ("start", "end"):
        if name in given:
            given[name] = _as_time(given[name])
    for name in ("hold_when", "step_back_when"):
        if name in given:
            given[name] = _drop(name, given[name])
            _check_watched(given[name], arguments, training)
    return METHODS[method](**given)


def _as_time(value: float) -> int | float:
    """A fraction of the training, or above 1 a step."""
    return int(value) if value > 1 and value.is_integer() else value


def _drop(name: str, text: str) -> Drop:
    try:
        drop = yaml.safe_load(text)
    except yaml.YAMLError:
        drop = None
    kinds: dict[str, Any] = {"metric": str, "by": (int, float), "greater_is_better": bool}
    if (
        not isinstance(drop, dict)
        or not {"metric", "by"} <= drop.keys() <= kinds.keys()
        or not all(isinstance(value, kinds[key]) for key, value in drop.items())
        or isinstance(drop["by"], bool)
    ):
        raise ValueError(
            f"`{name}` is {text!r}: write {{metric: accuracy, by: 0.01}}, and where it is not plain "
            "which way is better also `greater_is_better: false`."
        )
    return Drop(**drop)


def _check_watched(drop: Drop, arguments: CompressArguments, training: DistillationArguments) -> None:
    if training.eval_strategy == "no":
        raise ValueError(
            f"a drop of {drop.metric!r} cannot be seen without evaluations: set `eval_strategy` to "
            "'steps' or 'epoch'."
        )
    metrics = ["eval_loss"]
    if arguments.task != "causal-lm":
        metrics.append("eval_accuracy")
    if arguments.teacher is not None:
        metrics += ["eval_loss_task", "eval_loss_kd", "eval_agreement"]
    if drop.name not in metrics:
        raise ValueError(f"`metric` is {drop.metric!r}; evaluations will have {', '.join(metrics)}.")
