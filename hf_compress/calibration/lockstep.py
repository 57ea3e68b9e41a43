"""Runs all batches through a model at once, pausing each of them before the same layer.

Only a model's own forward knows how its layers are joined, and no forward can be suspended; but a
greenlet can. Each batch has one, which runs until it stands before the layer, and all are in the one
thread. So any architecture runs as it is, each layer sees the layers before it as they were changed,
nothing is computed twice, and what is held is what the forwards hold where they stand.

Threads would do the same at a price: OpenMP gives each of them a team of threads of its own, cores
times batches in all, and malloc an arena, which keeps memory that was freed.
"""

from __future__ import annotations

import ctypes
import inspect
import platform
from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate.utils import send_to_device
from greenlet import GreenletExit, getcurrent, greenlet
from torch import nn
from transformers import PreTrainedModel

from hf_compress.calibration.batches import Batch
from hf_compress.devices import host
from hf_compress.targets import without_adapters


@dataclass(frozen=True)
class Call:
    """What a module is about to be called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Stopped(Exception):
    """Ends a forward that is not needed any more."""


def lockstep(
    model: nn.Module, batches: Sequence[Batch], names: Collection[str]
) -> Generator[tuple[str, list[Call]], None, None]:
    """Yields each module of `names`, in the order of the forward, with its call for each batch; the
    calls are made when the next is asked for. Ends before the last of them is made.

    names: modules that a forward calls once, see `called_once`.

    Raises ValueError where the batches do not all reach the same modules, and what a forward raises.
    """
    devices = {param.device.type for param in model.parameters()} - {"meta"}
    kinds = sorted({host().type, *devices})
    lanes = [_Lane(partial(_forward, model, batch), kinds) for batch in batches]
    by_greenlet = {lane.greenlet: lane for lane in lanes}

    def pause(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        lane = by_greenlet.get(getcurrent())
        if lane is not None:  # else it is called by whom we yield to
            lane.pause(name, Call(args, kwargs))

    hooks = [
        model.get_submodule(name).register_forward_pre_hook(partial(pause, name), with_kwargs=True)
        for name in names
    ]
    ahead = set(names)
    try:
        while ahead:
            reached = [lane.advance() for lane in lanes]
            name, *others = sorted({str(place) for place in reached})
            if others or name not in ahead:
                raise ValueError(
                    f"the calibration batches take different ways, to {name} and {others}: give "
                    "batches of one kind."
                )
            ahead.remove(name)
            yield name, [lane.call for lane in lanes if lane.call is not None]
    finally:
        for lane in reversed(lanes):
            lane.stop()
        for hook in hooks:
            hook.remove()


class _Lane:
    """A function that stands still between one `advance` and the next."""

    def __init__(self, function: Callable[[], object], kinds: Sequence[str]) -> None:
        self.greenlet = greenlet(function)
        self.call: Call | None = None
        self._kinds = kinds

    def advance(self) -> str | None:
        """Runs on to the next pause; its name, None at the end."""
        self.call = None
        with _keeping_modes(self._kinds):
            place: str | None = self.greenlet.switch()
        _return_freed_memory()
        return place

    def pause(self, place: str, call: Call) -> None:
        self.call = call
        del call
        with _keeping_modes(self._kinds):
            self.greenlet.parent.switch(place)

    def stop(self) -> None:
        self.call = None
        with _keeping_modes(self._kinds):
            self.greenlet.throw(GreenletExit)


@contextmanager
def _keeping_modes(kinds: Sequence[str]) -> Iterator[None]:
    """Torch's modes belong to the thread, so whoever goes on must find his own again: the others have
    come into theirs, or out of them, in the meantime. kinds: of devices, as autocast takes them."""
    grad = torch.is_grad_enabled()
    casts = {kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds}
    try:
        yield
    finally:
        torch.set_grad_enabled(grad)
        for kind, (enabled, dtype) in casts.items():
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, dtype)


def _return_freed_memory() -> None:
    """What glibc's malloc has kept of it, to the system: what one forward frees lies between what the
    others hold, and of SmolLM2-135M with 32 x 512 tokens 100 MB and more stay so."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def called_once(model: nn.Module, batch: Batch, owners: Collection[str]) -> list[str]:
    """The modules before which to pause for a change of `owners`, in the order of the forward: each
    itself, or where it is called repeatedly (layers that share weights), the nearest one around it
    that is called once.

    Raises ValueError for an owner that `batch` does not reach.
    """
    calls = _count_calls(model, batch, owners)
    for owner in owners:
        if not calls[owner]:
            raise ValueError(
                f"the first calibration batch does not call `{owner}`, so its inputs cannot be seen: "
                f"give batches that reach it, or leave it out with `ignore={owner!r}`."
            )
    names = set()
    for owner in owners:
        parts = owner.split(".")
        around = (".".join(parts[:depth]) for depth in range(len(parts), -1, -1))
        names.add(next(name for name in around if calls[name] == 1))
    return [name for name in calls if name in names and not any(is_inside(name, o) for o in names)]


def is_inside(name: str, other: str) -> bool:
    """Whether the module `name` is a part of the module `other`, not itself."""
    return name != other and (other == "" or name.startswith(f"{other}."))


@torch.no_grad()
def _count_calls(model: nn.Module, batch: Batch, owners: Collection[str]) -> Counter[str]:
    """How often a forward calls each module, in the order of their first calls."""
    calls: Counter[str] = Counter()

    def count(name: str, module: nn.Module, args: Any) -> None:
        calls[name] += 1

    def stop(module: nn.Module, args: Any, output: Any) -> None:
        raise _Stopped

    modules = dict(model.named_modules())
    hooks = [module.register_forward_pre_hook(partial(count, name)) for name, module in modules.items()]
    inner = without_adapters(model)
    if isinstance(inner, PreTrainedModel) and inner.base_model is not inner:
        backbone = set(inner.base_model.modules())
        if all(modules[owner] in backbone for owner in owners):
            # The logits of a large vocabulary would take more memory than all the rest.
            hooks.append(inner.base_model.register_forward_hook(stop))
    if len({len(value) for value in batch.values()}) == 1:
        batch = {key: value[:1] for key, value in batch.items()}  # a row calls what all rows call
    try:
        _forward(model, batch)
    except _Stopped:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return calls


@torch.no_grad()
def _forward(model: nn.Module, batch: Batch) -> None:
    inputs: dict[str, Any] = dict(batch)
    device = next(model.parameters()).device
    if device.type != "meta":  # else offloaded, and accelerate moves the inputs
        inputs = send_to_device(inputs, device)
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs = {"use_cache": False} | inputs
    model(**inputs)
