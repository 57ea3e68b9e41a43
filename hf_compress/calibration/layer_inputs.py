"""Sums, over the calibration data, of what goes into the matrices of a layer."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_compress.calibration.batches import Batch, padding_mask
from hf_compress.calibration.lockstep import Call
from hf_compress.targets import Target, without_adapters

Accumulate = Callable[[Tensor | None, Tensor], Tensor]


@dataclass(eq=False)
class Seen:
    """Of the inputs of one matrix the sum of a statistic, None before the first, and their number."""

    total: Tensor | None = None
    positions: int = 0


class LayerInputs:
    """Sums up what goes into the weights of one layer after the other, over all batches.

    accumulate(total, inputs): adds the statistic of inputs (positions, in), fp32, to the total.

    Positions that an attention mask of their batch names as padding do not count; inputs of another
    shape than the mask (a pooler's, audio frames) count whole.
    """

    def __init__(self, batches: Sequence[Batch], accumulate: Accumulate) -> None:
        self._accumulate = accumulate
        self._batches = batches
        self._masks = [padding_mask(batch, "attention_mask") for batch in batches]
        self._outer_masks = self._masks
        self._outer: list[int | None] = [None] * len(batches)
        self._latest: list[weakref.ref[Tensor]] = []
        self._latest_seen = Seen()

    def enter_decoder(self, calls: Sequence[Call]) -> None:
        """From here on the inputs are a decoder's, but for the encoder states it is given."""
        self._masks = [padding_mask(batch, "decoder_attention_mask") for batch in self._batches]
        states = [call.kwargs.get("encoder_hidden_states") for call in calls]
        self._outer = [None if state is None else state.data_ptr() for state in states]

    def of(
        self, model: nn.Module, name: str, calls: Sequence[Call], targets: Sequence[Target]
    ) -> dict[str, list[Seen]]:
        """For each of `targets`, all in the module `name`, what it will see in `calls`: one entry for
        a matrix, one for each of stacked experts.

        Linear layers that are given the very same tensors (query, key and value) share one `Seen`.
        """
        module = model.get_submodule(name)
        if isinstance(module, (nn.Linear, Conv1D)):
            inputs = [call.args[0] for call in calls]
            return {target.name: [self._of_linear(inputs)] for target in targets}
        seen = {
            target.name: [Seen() for _ in range(len(target.param) if target.stacked else 1)]
            for target in targets
        }
        for index, call in enumerate(calls):

            def count(name: str, expert: int, inputs: Tensor, index: int = index) -> None:
                self._count(seen[name][expert], index, inputs)

            with _watching(model, targets, count):
                module(*call.args, **call.kwargs)
        return seen

    def _of_linear(self, inputs: Sequence[Tensor]) -> Seen:
        same = len(self._latest) == len(inputs) and all(
            reference() is tensor for reference, tensor in zip(self._latest, inputs, strict=True)
        )
        if not same:
            self._latest = [weakref.ref(tensor) for tensor in inputs]
            self._latest_seen = Seen()
            for index, tensor in enumerate(inputs):
                self._count(self._latest_seen, index, tensor)
        return self._latest_seen

    def _count(self, seen: Seen, index: int, inputs: Tensor) -> None:
        masks = self._outer_masks if inputs.data_ptr() == self._outer[index] else self._masks
        mask = masks[index]
        rows = inputs.detach().reshape(-1, inputs.shape[-1])
        if mask is not None and inputs.shape[:-1] in (mask.shape, (mask.numel(),)):
            rows = rows[mask.reshape(-1).to(rows.device)]
        seen.total = self._accumulate(seen.total, rows.float())
        seen.positions += len(rows)


@contextmanager
def _watching(
    model: nn.Module, targets: Sequence[Target], count: Callable[[str, int, Tensor], None]
) -> Iterator[None]:
    """Calls `count(name, expert, inputs)` for all that goes into `targets`; `expert` is 0 for layers
    that have modules of their own."""

    def see(name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        count(name, 0, args[0])

    def see_linear(inputs: Tensor, weight: Tensor) -> None:
        for name, owner in stacked.items():
            param = owner.get_parameter(name.rpartition(".")[2])
            distance = weight.data_ptr() - param.data_ptr()
            expert, rest = divmod(distance, param.stride(0) * param.element_size())
            if rest == 0 and 0 <= expert < len(param):
                count(name, expert, inputs)

    owners = {target.name: model.get_submodule(target.owner) for target in targets}
    stacked = {target.name: owners[target.name] for target in targets if target.stacked}
    hooks = [
        owner.register_forward_pre_hook(partial(see, name))
        for name, owner in owners.items()
        if name not in stacked
    ]
    try:
        with _LinearCalls(see_linear):
            yield
    finally:
        for hook in hooks:
            hook.remove()


class _LinearCalls(TorchFunctionMode):
    """Tells `see(inputs, weight)` of each call of `nn.functional.linear`: experts have no modules."""

    def __init__(self, see: Callable[[Tensor, Tensor], None]) -> None:
        super().__init__()
        self._see = see

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear:
            self._see(args[0], args[1])
        return func(*args, **(kwargs or {}))


@contextmanager
def eager_experts(model: nn.Module, targets: Sequence[Target]) -> Iterator[None]:
    """Only the plain loop over experts calls a linear function for each, where it can be seen."""
    inner = without_adapters(model)
    if not isinstance(inner, PreTrainedModel) or not any(target.stacked for target in targets):
        yield
        return
    implementation = inner.get_experts_implementation()
    inner.set_experts_implementation("eager")
    try:
        yield
    finally:
        inner.set_experts_implementation(implementation)
