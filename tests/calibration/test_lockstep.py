import gc
import platform
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import pytest
import torch
from tiny import VOCABULARY, tiny_llama
from torch import nn

from hf_compress.calibration.lockstep import called_once, lockstep


class Skipping(nn.Module):
    """Its last layer is also given what the first has answered; the middle one is called twice."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
        self.pair = nn.ModuleDict({"middle": nn.Linear(4, 4)})
        self.forwards = 0

    def forward(self, x):
        self.forwards += 1
        first = self.first(x)
        return self.last(self.pair["middle"](self.pair["middle"](first)) + first)


def rows(count):
    return [{"x": torch.randn(3, 4)} for _ in range(count)]


def test_each_layer_is_reached_by_all_batches_with_what_was_changed_before():
    model, batches = Skipping(), rows(5)
    reached = []
    for name, calls in lockstep(model, batches, {"first", "last"}):
        reached.append(name)
        for batch, call in zip(batches, calls, strict=True):
            first = model.first(batch["x"])
            middle = model.pair["middle"]
            expected = batch["x"] if name == "first" else middle(middle(first)) + first
            assert call.args[0].equal(expected)
            assert not call.args[0].requires_grad
        model.first.weight.data.zero_()
    assert reached == ["first", "last"]
    assert model.forwards == 5


def test_a_module_called_twice_is_replaced_by_what_is_around_it():
    model = Skipping()
    assert called_once(model, rows(1)[0], ["last", "first"]) == ["first", "last"]
    assert called_once(model, rows(1)[0], ["pair.middle", "first"]) == [""]


class Guarded(Skipping):
    """Counts the forwards that are under way."""

    def __init__(self):
        super().__init__()
        self.under_way = 0

    def forward(self, x):
        self.under_way += 1
        try:
            return super().forward(x)
        finally:
            self.under_way -= 1


def test_no_forward_is_left_whatever_happens():
    model, threads = Guarded(), threading.active_count()
    with closing(lockstep(model, rows(4), {"first", "last"})) as steps:
        next(steps)
        assert model.under_way == 4
        assert threading.active_count() == threads
    assert model.under_way == 0
    assert not model.first._forward_pre_hooks
    with pytest.raises(RuntimeError, match="cannot be multiplied"):  # what the forward raises
        list(lockstep(model, [*rows(2), {"x": torch.ones(2, 5)}, *rows(1)], {"first", "last"}))
    assert model.under_way == 0
    assert not model.first._forward_pre_hooks


class Moody(nn.Module):
    """Is paused within modes of torch's, and between them."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleDict({name: nn.Linear(8, 8) for name in "abcd"})

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            x = self.layers["b"](self.layers["a"](x))
            with torch.autocast("cpu", enabled=False), torch.enable_grad():
                x = self.layers["c"](x.float().detach())
        return self.layers["d"](x.detach())


def test_each_forward_is_in_its_own_modes_and_who_looks_on_in_his():
    model, batches = Moody(), [{"x": torch.randn(3, 8)} for _ in range(3)]
    expected = {f"layers.{name}": [] for name in "abcd"}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, to=to: to.append(args[0]))
        for name, to in expected.items()
    ]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for hook in hooks:
        hook.remove()
    for name, calls in lockstep(model, batches, expected):
        assert torch.is_grad_enabled()
        assert not torch.is_autocast_enabled("cpu")
        for call, inputs in zip(calls, expected[name], strict=True):
            assert call.args[0].dtype == inputs.dtype
            assert call.args[0].equal(inputs)
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")


def test_inference_mode_ends_with_the_forwards():
    model = Skipping()
    model.forward = torch.inference_mode()(model.forward)
    for _, calls in lockstep(model, rows(3), {"first", "last"}):
        assert len(calls) == 3
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()


def test_only_what_the_forwards_hold_is_held():
    model = tiny_llama(layers=4)
    batches = [{"input_ids": torch.randint(VOCABULARY, (2, 8))} for _ in range(3)]
    names = called_once(model, batches[0], [f"model.layers.{i}.mlp.down_proj" for i in range(4)])
    gc.collect()
    held = []
    for _, calls in lockstep(model, batches, names):
        del calls
        held.append(sum(type(thing) is torch.Tensor for thing in gc.get_objects()))
    assert max(held[1:]) == min(held[1:])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators were not measured")
def test_what_the_forwards_have_freed_is_used_by_the_next():
    # In a process of its own: what earlier tests have left free would be taken first.
    script = Path(__file__).with_name("resident.py")
    run = subprocess.run([sys.executable, script], capture_output=True, check=True, text=True)
    memory, threads = map(int, run.stdout.split())
    assert memory < 300e6  # each of the 12 held 64 MB on its way, and holds 0.3
    assert threads == 0
