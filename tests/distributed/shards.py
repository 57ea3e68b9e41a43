"""Run by two ranks: pruning on FSDP2 shards against one process. Exits 0 when they are equal.

One rank holds the whole model too, trained beside the sharded one on the same batches.
"""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hf_compress import constrain
from hf_compress.pruning.pruner import Pruner

STEPS = 20


def network():
    torch.manual_seed(0)
    # 9 rows do not divide by two ranks: the shards are of different sizes.
    return nn.Sequential(nn.Linear(16, 9), nn.ReLU(), nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 4))


def attach(net, optimizer, scope):
    names = ("0.weight", "2.weight", "4.weight")
    pruner = Pruner(0.75, scope=scope, interval=3, min_keep=0.1)
    params = {name: dict(net.named_parameters())[name] for name in names}
    return pruner, params, optimizer


def train(net, optimizer, pruner, first, last):
    for step in range(first, last):
        # Every rank sees the same batch, so that the mean over ranks is the batch of one process.
        x = torch.randn(32, 16, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (net(x) - 2 * x[:, :4]).square().mean().backward()
        pruner.at(step + 1, STEPS)
        optimizer.step()


def begin(net, scope):
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    pruner, params, _ = attach(net, optimizer, scope)
    constrain(optimizer, params, pruner)
    return optimizer, pruner


def compare(scope):
    whole = network()
    optimizer, pruner = begin(whole, scope)
    train(whole, optimizer, pruner, 0, STEPS)

    sharded = fully_shard(network(), mesh=init_device_mesh("cpu", (2,)))
    optimizer, pruner = begin(sharded, scope)
    train(sharded, optimizer, pruner, 0, STEPS // 2)
    # The state travels through torch's own calls into a new model, and training goes on.
    saved = get_optimizer_state_dict(sharded, optimizer)
    weights = sharded.state_dict()
    rest = fully_shard(network(), mesh=init_device_mesh("cpu", (2,)))
    rest.load_state_dict(weights)
    optimizer = torch.optim.AdamW(rest.parameters(), lr=1e-2)
    set_optimizer_state_dict(rest, optimizer, saved)
    pruner, params, _ = attach(rest, optimizer, scope)
    pruner.at(STEPS // 2, STEPS)
    constrain(optimizer, params, pruner)
    train(rest, optimizer, pruner, STEPS // 2, STEPS)

    expected = whole.state_dict()
    for name, value in rest.state_dict().items():
        assert value.full_tensor().equal(expected[name]), (scope, name)
    zeros = sum(int((expected[f"{i}.weight"] == 0).sum()) for i in (0, 2, 4))
    if scope == "global":
        assert zeros == round(0.75 * (16 * 9 + 9 * 8 + 8 * 4)), zeros


if __name__ == "__main__":
    dist.init_process_group("gloo")
    for scope in ("global", "layer"):
        compare(scope)
    dist.destroy_process_group()
    sys.exit(0)
