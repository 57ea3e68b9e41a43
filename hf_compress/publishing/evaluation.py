"""Two models, evaluated by one trainer on the same data."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.trainer_utils import has_length

from hf_compress.metrics.functions import perplexity
from hf_compress.publishing.recipe import bits_of, distils
from hf_compress.targets import without_adapters

# Names end so, also where the eval dataset has parts.
_OF_THE_RUN = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")


def trainer_scores(trainer: Any) -> Callable[[PreTrainedModel], dict[str, float]]:
    """A function of a model to what `trainer.evaluate` finds for it, without the prefix.

    Of a distilling trainer's losses only the task's own is kept, and the agreement with the teacher
    only for the other model. A causal language model gets a perplexity. A trainer without an eval
    dataset, or None in its place, finds nothing.

    Another model may take fewer inputs than the trainer's: a DistilBERT has no token types.
    """

    def evaluate(model: PreTrainedModel) -> dict[str, float]:
        if trainer is None or trainer.eval_dataset is None:
            return {}
        own = trainer.model
        compressed = trainer.accelerator.unwrap_model(own) is model
        prefix = "eval" if compressed else "dense"
        try:
            if not compressed:
                # The trainer's own loop, collator, metrics and precision, with another model in it.
                trainer.model = model if bits_of(model) else model.to(trainer.args.device)
            with _only_known_inputs(model):
                found = trainer.evaluate(metric_key_prefix=prefix)
        finally:
            trainer.model = own
        scores = {
            name.removeprefix(f"{prefix}_"): float(value)
            for name, value in found.items()
            if name.startswith(f"{prefix}_")
        }
        dropped = list(_OF_THE_RUN)
        causal = type(model).__name__.endswith("ForCausalLM")
        if distils(trainer):
            dropped += ["loss", "loss_kd"] if compressed else ["loss", "loss_kd", "agreement"]
        elif trainer.args.world_size > 1 and not causal:
            # Trainer multiplies it by the number of processes where a head ignores the item count.
            dropped.append("loss")
        pattern = re.compile(rf"(^|_)({'|'.join(dropped)})$")
        scores = {name: value for name, value in scores.items() if not pattern.search(name)}
        loss = scores.get("loss_task", scores.get("loss"))
        if loss is not None and causal:
            scores["perplexity"] = perplexity(loss)
        return scores

    return evaluate


def first_batch(trainer: Any) -> dict[str, Tensor] | None:
    """The first batch of the eval dataset without labels; None where there is none."""
    if trainer is None or trainer.eval_dataset is None:
        return None
    name = next(iter(trainer.eval_dataset)) if isinstance(trainer.eval_dataset, dict) else None
    batch = next(iter(trainer.get_eval_dataloader(name)))
    return {k: v for k, v in batch.items() if torch.is_tensor(v) and k != "labels"}


def accepted_by_all(models: Iterable[nn.Module], batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those entries of `batch` that every model's forward names."""
    signatures = [inspect.signature(model.forward).parameters for model in models]
    return {k: v for k, v in batch.items() if all(k in names for names in signatures)}


def rows(trainer: Any) -> int | None:
    """Rows of the eval dataset, of all parts where it has several; None where they are unknown."""
    if trainer is None or trainer.eval_dataset is None:
        return None
    data = trainer.eval_dataset
    parts = list(data.values()) if isinstance(data, dict) else [data]
    return sum(len(part) for part in parts) if all(map(has_length, parts)) else None


@contextmanager
def _only_known_inputs(model: nn.Module) -> Iterator[None]:
    """Meanwhile a model whose forward would refuse unknown names is called without them.

    Most models of transformers take any, and leave alone what they do not know.
    """
    parameters = inspect.signature(without_adapters(model).forward).parameters

    def drop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args, {name: value for name, value in kwargs.items() if name in parameters}

    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        yield
        return
    hook = model.register_forward_pre_hook(drop, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
