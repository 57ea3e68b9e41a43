"""Runs all batches through a model at once, pausing each of them before the same layer.

Only a model's own forward knows how its layers are joined, and no forward can be suspended; but a
thread can. Each batch has a thread, of which one runs at a time, until all stand before the same
layer. So any architecture runs as it is, each layer sees the layers before it as they were changed,
nothing is computed twice, and what is held is what the forwards hold where they stand.
"""

from __future__ import annotations

import ctypes
import inspect
import platform
import threading
from collections import Counter
from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn
from transformers import PreTrainedModel

from hf_compress.pruning.calibration import Batch
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
    lanes = [_Lane(partial(_forward, model, batch)) for batch in batches]
    by_thread = {lane.thread: lane for lane in lanes}

    def pause(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        lane = by_thread.get(threading.current_thread())
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
        for lane in lanes:
            lane.stop()
        for hook in hooks:
            hook.remove()
        _return_freed_memory()


class _Lane:
    """A function in a thread that runs only while `advance` waits for it."""

    def __init__(self, function: Callable[[], object]) -> None:
        self._function = function
        self._go, self._stands = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None
        self._stopping = False
        self._place: str | None = None
        self.call: Call | None = None
        self.thread = threading.Thread(target=self._work, daemon=True)

    def advance(self) -> str | None:
        """Runs on to the next pause; its name, None at the end."""
        self.call = self._place = None
        if self.thread.ident is None:
            self.thread.start()
        self._go.release()
        self._stands.acquire()
        _return_freed_memory()
        if self._error is not None:
            raise self._error
        return self._place

    def pause(self, place: str, call: Call) -> None:
        self._place, self.call = place, call
        del call
        self._stands.release()
        self._go.acquire()
        if self._stopping:
            raise _Stopped

    def stop(self) -> None:
        self._stopping = True
        self.call = None
        if self.thread.ident is not None:
            self._go.release()
            self.thread.join()

    def _work(self) -> None:
        self._go.acquire()
        try:
            self._function()
        except _Stopped:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self._stands.release()


def _return_freed_memory() -> None:
    """What glibc's malloc has kept for the threads, to the system: it keeps for each of them some of
    what it has freed, which over all batches comes to more than they hold."""
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
