"""What a model gives its output layer, taken in its forward, in place of the logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from hf_compress.distillation.output_layer import OutputLayer
from hf_compress.frozen import evaluating
from hf_compress.targets import without_adapters

# Entries of configs that multiply the logits or divide them, and that bound them.
_SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap")
# What BART and its relatives add to their logits.
_BIAS = "final_logits_bias"


class CannotTap(Exception):
    """Why logits are not made of hidden states as `OutputLayer` says, in words for a log."""


@dataclass(frozen=True, kw_only=True)
class Tap:
    """An output layer whose model was seen to turn what the layer is given into logits in this way."""

    head: nn.Linear
    bias: Tensor | None
    scale: float
    softcap: float | None

    def layer(self) -> OutputLayer:
        """As its weights are now: for shards, which are gathered, on all processes at once."""
        weight, bias = _whole(self.head.weight), _whole(self.head.bias)
        if self.bias is not None:
            bias = self.bias if bias is None else bias + self.bias
        return OutputLayer(weight=weight, bias=bias, scale=self.scale, softcap=self.softcap)

    @contextmanager
    def taking(self, take: Callable[[Tensor], None]) -> Iterator[None]:
        """In a forward of the model `take` is given the hidden states, (rows, positions, width), while
        the weights of the layer are whole. The model's own logits are of no position.
        """

        def before(module: nn.Module, args: tuple[Tensor]) -> Tensor:
            take(args[0])
            return args[0][:, :0]

        handle = self.head.register_forward_pre_hook(before)
        try:
            yield
        finally:
            handle.remove()


def tap(model: nn.Module, forward: Callable[[], Any]) -> Tap:
    """Finds out how `model` makes its logits, by one forward in evaluation mode without gradients.

    forward: runs the model, in the precision of training, and gives its output.
    Raises CannotTap where it makes them in another way, or its layer is quantized, adapted or hooked.
    """
    inner: Any = without_adapters(model)
    head = check_layer(inner.get_output_embeddings())
    expected: list[tuple[Tap, Tensor]] = []

    def probe(module: nn.Module, args: tuple[Any, ...]) -> Tensor:
        if len(args) != 1 or args[0].ndim != 3 or expected:
            raise CannotTap("its output layer is not given all hidden states at once")
        candidates = [
            (each, each.layer().under_autocast().ready()) for each in _candidates(inner, head)
        ]
        states = _telling_states(candidates[-1][1], args[0])
        expected.extend((each, layer.logits(states)) for each, layer in candidates)
        return states

    handle = head.register_forward_pre_hook(probe)
    try:
        with torch.no_grad(), evaluating(model):
            logits = forward().logits
    finally:
        handle.remove()
    for candidate, values in expected:
        if logits.shape == values.shape and _equal(logits, values):
            return candidate
    if not expected:
        raise CannotTap("its forward does not call its output layer")
    raise CannotTap(
        "its logits are not those of its output layer, scaled or bounded as its config says"
    )


def check_layer(head: Any) -> nn.Linear:
    """The output layer itself. Raises CannotTap where it is not an ordinary one."""
    if head is None:
        raise CannotTap("there is no output layer over a vocabulary")
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        name, package = type(head).__name__, type(head).__module__.partition(".")[0]
        raise CannotTap(f"its output layer is of type {name} of {package}, not a plain Linear")
    if "forward" in vars(head):
        raise CannotTap("its output layer is on several devices, or its forward was replaced")
    if type(head.weight) is not nn.Parameter and not isinstance(head.weight, DTensor):
        raise CannotTap(f"the weight of its output layer is a {type(head.weight).__name__}")
    if not isinstance(head, FSDPModule) and (head._forward_pre_hooks or head._forward_hooks):
        raise CannotTap("something else is hooked to its output layer")
    return head


def _candidates(model: Any, head: nn.Linear) -> Iterator[Tap]:
    """What the config says comes first: of small logits a bound cannot be seen."""
    config = model.config.get_text_config(decoder=True).to_dict()
    factors, bounds = (
        [float(config[name]) for name in names if isinstance(config.get(name), int | float)]
        for names in (_SCALES, _SOFTCAPS)
    )
    scales = [scale for factor in factors if factor for scale in (factor, 1 / factor)]
    bias = dict(model.named_buffers(recurse=False)).get(_BIAS)
    for scale, softcap in product([*scales, 1.0], [*bounds, None]):
        yield Tap(
            head=head, bias=None if bias is None else bias.flatten(), scale=scale, softcap=softcap
        )


def _telling_states(layer: OutputLayer, given: Tensor) -> Tensor:
    """(rows, 1, width), as `given`, of which the logits are large enough to show what bounds them."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(len(given), 1, given.shape[-1], generator=generator).to(given)
    return states * (30 / layer.logits(states).abs().max().clamp(min=1e-6)).to(given.dtype)


def _equal(ours: Tensor, theirs: Tensor) -> bool:
    tolerance = 1e-4 if ours.dtype in (torch.float32, torch.float64) else 2e-2
    ours, theirs = ours.float(), theirs.float()
    return bool((ours - theirs).abs().max() <= tolerance * theirs.abs().max())


def _whole(value: Any) -> Any:
    return value.full_tensor() if isinstance(value, DTensor) else value
