"""Runs a model block by block, whatever its architecture, with one block's inputs held at a time.

Only a model's own forward knows how its blocks are joined: masks, positions, encoder states, what
stands between them. So for each block that forward is run again, up to this block and no further,
while the blocks before it are stood for by what they answered when it was their turn.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate.utils import recursively_apply, send_to_device
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_compress.pruning.calibration import Batch
from hf_compress.targets import without_adapters


@dataclass(frozen=True)
class Block:
    """A module that a forward calls once: an encoder or decoder layer, or a layer that is in none.

    stack: the ModuleList it belongs to, of which each block needs only the answer of the one before;
        its own name where there is none.
    last: the owner of weights inside it that is called last; None where one is called repeatedly.
    """

    name: str
    stack: str
    module: nn.Module
    last: str | None

    def holds(self, name: str) -> bool:
        """Whether the module of this name is the block or in it."""
        return name == self.name or _is_inside(name, self.name)


class Reached(Exception):
    """Ends a forward as soon as it has done what it was run for."""


class BlockByBlock:
    """`for block in walk.blocks:` run it with `run`, change its weights, then `advance` over it.

    model: in evaluation mode. batches: mappings of tensors as its forward takes.
    owners: names of the modules whose weights are to be changed; `blocks` are those that hold them,
        in the order in which the forward calls them.

    Holds, for each batch, the answer of the latest block of each stack: the inputs of the next.

    Raises ValueError for owners that the first batch does not reach.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Batch], owners: Collection[str]) -> None:
        self._model = model
        self._batches = batches
        self._done: list[Block] = []
        self._answers: dict[str, list[Any]] = {}
        self.blocks = self._find(owners)

    @torch.no_grad()
    def run(self, block: Block, index: int) -> Any:
        """Runs batch `index` to the end of `block` and returns its answer; None where a hook inside
        the block raised `Reached`.

        Raises ValueError where the batch does not reach the block, or where the block needs more
        than the answer of the block before.
        """
        answer = None

        def stop(module: nn.Module, args: Any, output: Any) -> None:
            nonlocal answer
            answer = output
            raise Reached

        hooks = [
            block.module.register_forward_pre_hook(
                partial(_check_inputs, block), prepend=True, with_kwargs=True
            ),
            block.module.register_forward_hook(stop),
        ]
        try:
            with self._replayed(index):
                self._forward(index)
        except Reached:
            return answer
        finally:
            for hook in hooks:
                hook.remove()
        raise ValueError(
            f"calibration batch {index} did not reach `{block.name}`, which the first batch did: "
            "give batches of one kind."
        )

    def advance(self, block: Block) -> None:
        """Runs `block` on every batch as it is now, to be replayed to the blocks after it."""
        answers = self._answers.setdefault(block.stack, [None] * len(self._batches))
        for index in range(len(self._batches)):
            answers[index] = self.run(block, index)
            if _has_nan(answers[index]):
                raise ValueError(
                    f"`{block.name}` answers calibration batch {index} with NaN. If the model is in "
                    "float16, load it in bfloat16 or float32."
                )
        self._done.append(block)

    def _forward(self, index: int) -> None:
        batch = dict(self._batches[index])
        device = next(self._model.parameters()).device
        if device.type != "meta":  # else offloaded, and accelerate moves the inputs
            batch = send_to_device(batch, device)
        if "use_cache" in _arguments(self._model):
            self._model(**{"use_cache": False} | batch)
        else:
            self._model(**batch)

    @contextmanager
    def _replayed(self, index: int) -> Iterator[None]:
        latest = {block.stack: block for block in self._done}
        for block in self._done:
            answer = self._answers[block.stack][index]
            # A block may work in place on what it is given.
            mark = torch.clone if latest[block.stack] is block else _nan_like
            replay = _Replay(block.module, recursively_apply(mark, answer))
            self._model.set_submodule(block.name, replay)
        try:
            yield
        finally:
            for block in self._done:
                self._model.set_submodule(block.name, block.module)

    def _find(self, owners: Collection[str]) -> list[Block]:
        calls = self._count_calls(owners)
        for owner in owners:
            if not calls[owner]:
                raise ValueError(
                    f"the first calibration batch does not call `{owner}`, so its inputs cannot be "
                    f"seen: give batches that reach it, or leave it out with `ignore={owner!r}`."
                )
        names = {_block_of(self._model, owner, calls) for owner in owners}
        outermost = {name for name in names if not any(_is_inside(name, other) for other in names)}
        return [self._block(name, owners, calls) for name in calls if name in outermost]

    def _block(self, name: str, owners: Collection[str], calls: Counter[str]) -> Block:
        parent = name.rpartition(".")[0]
        listed = name and isinstance(self._model.get_submodule(parent), nn.ModuleList)
        own = [
            owner for owner in calls if owner in owners and (owner == name or _is_inside(owner, name))
        ]
        once = all(calls[owner] == 1 for owner in own)
        return Block(
            name=name,
            stack=parent if listed else name,
            module=self._model.get_submodule(name),
            last=own[-1] if once else None,
        )

    @torch.no_grad()
    def _count_calls(self, owners: Collection[str]) -> Counter[str]:
        """How often the first batch calls each module, in the order of their first calls."""
        calls: Counter[str] = Counter()

        def count(name: str, module: nn.Module, args: Any) -> None:
            calls[name] += 1

        def stop(module: nn.Module, args: Any, output: Any) -> None:
            raise Reached

        modules = dict(self._model.named_modules())
        hooks = [
            module.register_forward_pre_hook(partial(count, name)) for name, module in modules.items()
        ]
        inner = without_adapters(self._model)
        if isinstance(inner, PreTrainedModel) and inner.base_model is not inner:
            backbone = set(inner.base_model.modules())
            if all(modules[owner] in backbone for owner in owners):
                # The logits of a large vocabulary would take more memory than all the rest.
                hooks.append(inner.base_model.register_forward_hook(stop))
        try:
            self._forward(0)
        except Reached:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        return calls


class _Replay(nn.Module):
    """Stands for a block that has had its turn: gives its answer without computing it."""

    def __init__(self, block: nn.Module, answer: Any) -> None:
        super().__init__()
        self._block = (block,)  # in a tuple, lest it become a submodule
        self._answer = answer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._answer

    def __getattr__(self, name: str) -> Any:
        # A model may ask its blocks what kind they are.
        return getattr(self._block[0], name)


def _block_of(model: nn.Module, owner: str, calls: Counter[str]) -> str:
    """The outermost member of a ModuleList around `owner`, else `owner` itself; where these are
    called repeatedly (shared layers), the nearest module around that is called once."""
    parts = owner.split(".")
    path = [".".join(parts[:depth]) for depth in range(len(parts) + 1)]
    for parent, name in zip(path, path[1:], strict=False):
        if calls[name] == 1 and isinstance(model.get_submodule(parent), nn.ModuleList):
            return name
    return next(name for name in reversed(path) if calls[name] == 1)


def _is_inside(name: str, other: str) -> bool:
    return name != other and (other == "" or name.startswith(f"{other}."))


def _arguments(model: nn.Module) -> Collection[str]:
    return inspect.signature(model.forward).parameters


def _nan_like(tensor: Tensor) -> Tensor:
    return torch.full_like(tensor, torch.nan) if tensor.is_floating_point() else tensor


def _has_nan(data: Any) -> bool:
    found = []
    recursively_apply(
        lambda tensor: found.append(tensor.is_floating_point() and bool(tensor.isnan().any())), data
    )
    return any(found)


def _check_inputs(block: Block, module: nn.Module, args: Any, kwargs: Any) -> None:
    # The blocks before the one before answer with NaN: if any of it arrives here, it was needed.
    if _has_nan((args, kwargs)):
        raise ValueError(
            f"`{block.name}` uses what a block further back than the one before it has answered, and "
            "only the latest answers are held: this architecture cannot be run block by block."
        )
