"""Run by two ranks: pruning on FSDP2 shards against one process. Exits 0 when they are equal.

One rank holds the whole model too, trained beside the sharded one on the same batches.
"""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers.pytorch_utils import Conv1D

from hf_compress import constrain
from hf_compress.pruning.input_squares import InputSquares
from hf_compress.pruning.pruner import Pruner
from hf_compress.pruning.regrowth import RigL
from hf_compress.targets import find_targets

STEPS = 20
SPARSITY = 0.75
METHODS = {
    "global": {},
    "layer": {"scope": "layer"},
    "magnitude": {"score": "magnitude"},
    "row": {"scope": "row", "score": "wanda"},
    "random": {"score": "random"},
    "taylor": {"score": "taylor"},
    "1:4": {"pattern": "1:4"},
    "1x2": {"pattern": "1x2"},
    "rows": {"pattern": "row", "score": "taylor"},
    "RigL": {},
}


def network():
    torch.manual_seed(0)
    # 9 rows do not divide by two ranks: the shards are of different sizes.
    return nn.Sequential(nn.Linear(16, 9), nn.ReLU(), nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 4))


def wide():
    """All widths divide by four, as the patterns need; the rows still not by two ranks."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 9), nn.Linear(9, 4)
    )


def constraint(net, method, done=0):
    """The constraint of a method, and its targets."""
    plain = method in ("global", "layer", "magnitude", "random", "taylor", "RigL", "rows")
    targets = find_targets(net, None if plain else ["0", "2", "4"]).targets
    if method == "RigL":
        made = RigL(SPARSITY, interval=3)
    else:
        settings = METHODS[method]
        sparsity = None if ":" in settings.get("pattern", "") else SPARSITY
        inputs = InputSquares(net, targets) if settings.get("score") == "wanda" else None
        made = Pruner(sparsity, interval=3, min_keep=0.1, targets=targets, inputs=inputs, **settings)
    made.at(done, STEPS)
    return made, {name: target.param for name, target in targets.items()}


def train(net, optimizer, pruner, first, last):
    for step in range(first, last):
        # Every rank sees the same batch, so that the mean over ranks is the batch of one process.
        x = torch.randn(32, 16, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (net(x) - 2 * x[:, :4]).square().mean().backward()
        pruner.at(step + 1, STEPS)
        optimizer.step()


def begin(net, optimizer, method, done=0):
    pruner, parameters = constraint(net, method, done)
    constrain(optimizer, parameters, pruner)
    return pruner


def sharded(make):
    return fully_shard(make(), mesh=init_device_mesh("cpu", (2,)))


def compare(method):
    make = wide if method in ("1:4", "1x2", "row") else network
    whole = make()
    optimizer = torch.optim.AdamW(whole.parameters(), lr=1e-2)
    train(whole, optimizer, begin(whole, optimizer, method), 0, STEPS)

    part = sharded(make)
    optimizer = torch.optim.AdamW(part.parameters(), lr=1e-2)
    train(part, optimizer, begin(part, optimizer, method), 0, STEPS // 2)
    # The state travels through torch's own calls into a new model, and training goes on.
    saved = get_optimizer_state_dict(part, optimizer)
    weights = part.state_dict()
    rest = sharded(make)
    rest.load_state_dict(weights)
    optimizer = torch.optim.AdamW(rest.parameters(), lr=1e-2)
    set_optimizer_state_dict(rest, optimizer, saved)
    train(rest, optimizer, begin(rest, optimizer, method, STEPS // 2), STEPS // 2, STEPS)

    expected = whole.state_dict()
    for name, value in rest.state_dict().items():
        assert value.full_tensor().equal(expected[name]), (method, name)
    if method in ("global", "magnitude", "random", "taylor"):
        zeros = sum(int((expected[f"{i}.weight"] == 0).sum()) for i in (0, 2, 4))
        assert zeros == round(SPARSITY * (16 * 9 + 9 * 8 + 8 * 4)), zeros


def refuse(make, message, **settings):
    """What the shards cut is refused, by all ranks."""
    net = sharded(make)
    targets = find_targets(net).targets
    if settings.get("score") == "wanda":
        settings["inputs"] = InputSquares(net, targets)
    parameters = {name: target.param for name, target in targets.items()}
    optimizer = torch.optim.AdamW(net.parameters())
    with pytest.raises(ValueError, match=message):
        constrain(optimizer, parameters, Pruner(targets=targets, **settings))


if __name__ == "__main__":
    dist.init_process_group("gloo")
    for method in METHODS:
        compare(method)
    # Shards of 2 input features cut groups of 4, and of 3 output features blocks of 2.
    refuse(lambda: nn.Sequential(Conv1D(8, 4)), "cut what belongs together", pattern="2:4")
    refuse(lambda: nn.Sequential(nn.Linear(4, 6)), "cut what", pattern="2x1", sparsity=0.5)
    refuse(lambda: nn.Sequential(Conv1D(8, 4)), "input features", score="wanda", sparsity=0.5)
    dist.destroy_process_group()
