"""Two models, evaluated by one trainer on the same data."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.trainer_utils import has_length

from hf_compress.metrics.functions import perplexity
from hf_compress.publishing.recipe import bits_of, distils
from hf_compress.publishing.scores import scores_of, task_of
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
                # The trainer's own loop, collator and metrics, with another model in it.
                trainer.model = model if bits_of(model) else model.to(trainer.args.device)
            # Its own model was given its precision when it was prepared; another is not prepared.
            precision = nullcontext() if compressed else trainer.accelerator.autocast()
            with _only_known_inputs(model), precision:
                found = trainer.evaluate(metric_key_prefix=prefix)
                if _is_miscounted(trainer, model) and not _in_parts(trainer):
                    found |= {f"{prefix}_loss": _token_loss(trainer, model)}
        finally:
            trainer.model = own
        scores = {
            name.removeprefix(f"{prefix}_"): float(value)
            for name, value in found.items()
            if name.startswith(f"{prefix}_")
        }
        dropped = list(_OF_THE_RUN)
        causal = task_of(model) == "tokens"
        if distils(trainer):
            dropped += ["loss", "loss_kd"] if compressed else ["loss", "loss_kd", "agreement"]
        elif trainer.args.world_size > 1 and not causal:
            # Trainer multiplies it by the number of processes where a head ignores the item count.
            dropped.append("loss")
        elif _is_miscounted(trainer, model) and _in_parts(trainer):
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


def _is_miscounted(trainer: Any, model: PreTrainedModel) -> bool:
    """Whether Trainer divides a loss by more tokens than it is the sum of: of a causal model it counts
    the first token of each row too, unless the model tells its loss by name. GPT-2 does not."""
    return task_of(model) == "tokens" and model.loss_type != "ForCausalLM" and not distils(trainer)


def _in_parts(trainer: Any) -> bool:
    """Whether each process, or each part of the eval dataset, has only some of the rows."""
    return trainer.args.world_size > 1 or isinstance(trainer.eval_dataset, dict)


def _token_loss(trainer: Any, model: PreTrainedModel) -> float:
    batches = trainer.get_eval_dataloader()
    return scores_of(model, batches, context=trainer.compute_loss_context_manager)["loss"]


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
