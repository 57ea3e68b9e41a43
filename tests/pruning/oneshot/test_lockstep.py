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

from hf_compress.pruning.oneshot.lockstep import called_once, lockstep


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


def test_no_thread_is_left_whatever_happens():
    before = threading.active_count()
    with closing(lockstep(Skipping(), rows(4), {"first", "last"})) as steps:
        next(steps)
        assert threading.active_count() == before + 4
    assert threading.active_count() == before
    with pytest.raises(RuntimeError, match="cannot be multiplied"):  # what the forward raises
        list(lockstep(Skipping(), [*rows(2), {"x": torch.ones(2, 5)}], {"first", "last"}))
    assert threading.active_count() == before


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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators are not asked")
def test_what_the_threads_have_freed_is_given_back():
    # In a process of its own: what earlier tests have left free would be taken first.
    script = Path(__file__).with_name("resident.py")
    run = subprocess.run([sys.executable, script], capture_output=True, check=True, text=True)
    assert int(run.stdout) < 60e6  # each of the 12 held 64 MB on its way, and holds 0.3
