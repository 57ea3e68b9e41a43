"""Sums, over the calibration data, of what goes into each matrix of a block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from hf_compress.pruning.blocks import Block, Reached
from hf_compress.pruning.calibration import Batch, padding_mask
from hf_compress.targets import Target, without_adapters

Accumulate = Callable[[Tensor | None, Tensor], Tensor]


@dataclass(eq=False)
class Seen:
    """Of the inputs of one matrix the sum of a statistic, None before the first, and their number."""

    total: Tensor | None = None
    positions: int = 0


class BlockInputs:
    """Watches what goes into `targets` while their block runs.

    accumulate(total, inputs): adds the statistic of inputs (positions, in), fp32, to the total.

    `seen[name]` has one entry for a matrix and one for each of stacked experts. Matrices that are
    given the very same tensor (query, key and value) share theirs. Positions that an attention mask
    of the batch names as padding do not count; inputs of another shape than the mask (a pooler's,
    audio frames) count whole.
    """

    def __init__(
        self, model: nn.Module, block: Block, targets: Sequence[Target], accumulate: Accumulate
    ) -> None:
        self._block = block
        self._accumulate = accumulate
        self._owners = {target.name: model.get_submodule(owner_of(target)) for target in targets}
        self._stacked = [target.name for target in targets if is_stacked(target)]
        self._in_decoder = _is_in_decoder(model, block)
        self._latest: tuple[Tensor | None, str] = (None, "")
        self._mask: Tensor | None = None
        self._outer_mask: Tensor | None = None
        self._outer: set[int] = set()
        self.seen = {
            target.name: [Seen() for _ in range(len(target.param) if is_stacked(target) else 1)]
            for target in targets
        }

    @contextmanager
    def watching(self, batch: Batch) -> Iterator[None]:
        """Counts in the inputs of a forward of `batch`; the last of them ends it by `Reached`."""
        self._outer_mask = self._mask = padding_mask(batch, "attention_mask")
        if self._in_decoder:
            self._mask = padding_mask(batch, "decoder_attention_mask")
        hooks = [self._block.module.register_forward_pre_hook(self._note_outer, with_kwargs=True)]
        for name, owner in self._owners.items():
            if name not in self._stacked:
                hooks.append(owner.register_forward_pre_hook(partial(self._see, name)))
        try:
            with ExitStack() as stack:
                if self._stacked:
                    stack.enter_context(_LinearCalls(self._see_expert))
                yield
        finally:
            self._latest = (None, "")
            for hook in hooks:
                hook.remove()

    def _note_outer(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        # What a decoder layer is given beside its own hidden states comes from the encoder.
        others = (*args[1:], *kwargs.values())
        self._outer = {other.data_ptr() for other in others if isinstance(other, Tensor)}

    def _see(self, name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs, leader = args[0], name
        if inputs is self._latest[0]:
            leader = self._latest[1]
            self.seen[name] = self.seen[leader]
        else:
            self._count(self.seen[name][0], inputs)
        self._latest = (inputs, leader)
        if self._block.last is not None and name.rpartition(".")[0] == self._block.last:
            raise Reached

    def _see_expert(self, inputs: Tensor, weight: Tensor) -> None:
        for name in self._stacked:
            stacked = self._owners[name].get_parameter(name.rpartition(".")[2])
            distance = weight.data_ptr() - stacked.data_ptr()
            expert, rest = divmod(distance, stacked.stride(0) * stacked.element_size())
            if rest == 0 and 0 <= expert < len(stacked):
                self._count(self.seen[name][expert], inputs)

    def _count(self, seen: Seen, inputs: Tensor) -> None:
        mask = self._outer_mask if inputs.data_ptr() in self._outer else self._mask
        rows = inputs.reshape(-1, inputs.shape[-1])
        if mask is not None and inputs.shape[:-1] in (mask.shape, (mask.numel(),)):
            rows = rows[mask.reshape(-1).to(rows.device)]
        seen.total = self._accumulate(seen.total, rows.float())
        seen.positions += len(rows)


class _LinearCalls(TorchFunctionMode):
    """Tells `see(inputs, weight)` of each call of `nn.functional.linear`: experts have no modules."""

    def __init__(self, see: Callable[[Tensor, Tensor], None]) -> None:
        super().__init__()
        self._see = see

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear:
            self._see(args[0], args[1])
        return func(*args, **(kwargs or {}))


def owner_of(target: Target) -> str:
    """The name of the module that a target belongs to."""
    return target.name.rpartition(".")[0]


def is_stacked(target: Target) -> bool:
    """Whether the target is the stacked matrices of experts, (experts, out, in)."""
    return target.input_dim == -1


@contextmanager
def eager_experts(model: nn.Module, targets: Sequence[Target]) -> Iterator[None]:
    """Only the plain loop over experts calls a linear function for each, where it can be seen."""
    inner = without_adapters(model)
    if not isinstance(inner, PreTrainedModel) or not any(is_stacked(target) for target in targets):
        yield
        return
    implementation = inner.get_experts_implementation()
    inner.set_experts_implementation("eager")
    try:
        yield
    finally:
        inner.set_experts_implementation(implementation)


def _is_in_decoder(model: nn.Module, block: Block) -> bool:
    inner = without_adapters(model)
    if not isinstance(inner, PreTrainedModel) or not inner.config.is_encoder_decoder:
        return False
    return block.module in set(inner.get_decoder().modules())
