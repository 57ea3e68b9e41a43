"""Models that are asked and not trained: in evaluation mode for a while, frozen, frozen copies."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation mode; afterwards each module is in the mode in which it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def freeze_(model: nn.Module) -> nn.Module:
    """Eval mode and no gradients, in place."""
    return model.eval().requires_grad_(False)


def snapshot(model: nn.Module) -> nn.Module:
    """A frozen copy of `model` as it is now, sharing no storage with it."""
    copied = copy.deepcopy(model)
    for module in copied.modules():
        # A forward patched onto the instance (trl's fused head) is a closure over the original,
        # which the copy would run. Accelerate's dispatch hooks copy properly and are needed.
        if "forward" in vars(module) and "_hf_hook" not in vars(module):
            del module.forward
    return freeze_(copied)
