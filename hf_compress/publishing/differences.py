"""What sets a compressed model apart from the dense one."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from transformers import PreTrainedModel


def structure_of(model: PreTrainedModel, baseline: PreTrainedModel | None) -> dict[str, dict[str, int]]:
    """The sizes in the config that differ, as {"num_hidden_layers": {"dense": 6, "compressed": 3}};
    none for models of different architectures."""
    if baseline is None or type(baseline.config) is not type(model.config):
        return {}
    now, then = model.config.to_dict(), baseline.config.to_dict()
    return {
        name: {"dense": then[name], "compressed": now[name]}
        for name in now
        # No flags, which are of a class of their own, and no numbers of tokens.
        if type(now[name]) is type(then.get(name)) is int
        and now[name] != then[name]
        and not name.endswith("_id")
    }


def float_weights(model: PreTrainedModel | None, names: Iterable[str]) -> list[Tensor]:
    """The values of those weights `names` that `model` has, and not packed."""
    parameters = {} if model is None else dict(model.named_parameters())
    found = (parameters[name] for name in names if name in parameters)
    return [weight.detach() for weight in found if weight.is_floating_point()]
