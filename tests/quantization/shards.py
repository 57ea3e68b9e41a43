"""Run by two ranks: training on a grid on FSDP2 shards against one process. Exits 0 when equal.

Each rank trains the whole model too, beside its shards, on the same batches.
"""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers.pytorch_utils import Conv1D

from hf_compress import constrain, quantize_oneshot_
from hf_compress.pruning.pruner import Pruner
from hf_compress.quantization.quantizer import Quantizer
from hf_compress.targets import find_targets

STEPS = 12
METHODS = {
    "channels": {"bits": 4},
    "groups": {"bits": (8, 3), "group_size": 4, "symmetric": False, "grid": "auto"},
    "pruned": {"bits": 4, "group_size": 8},
    "Conv1D": {"bits": 4, "group_size": 4},
    "learned": {"bits": 3, "learn_scale": True},
    "given": {"bits": 3, "group_size": 8, "symmetric": False, "given": True},
    "given to Conv1D": {"bits": 3, "group_size": 4, "given": True},
}


def network(conv1d=False):
    torch.manual_seed(0)
    # 9 rows do not divide by two ranks: the shards are of different sizes.
    first = [Conv1D(8, 16)] if conv1d else [nn.Linear(16, 9), nn.ReLU(), nn.Linear(9, 8)]
    return nn.Sequential(*first, nn.ReLU(), nn.Linear(8, 4))


def sharded(conv1d=False):
    return fully_shard(network(conv1d), mesh=init_device_mesh("cpu", (2,)))


def begin(net, method, saved=None, done=0):
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    if saved is not None:
        set_optimizer_state_dict(net, optimizer, saved)
    # Groups of 4 and 8 do not divide 9 inputs.
    ignore = "re:^2.weight" if method in ("groups", "pruned", "given") else None
    targets = find_targets(net, None, ignore)
    settings = dict(METHODS[method])
    if settings.pop("given", False):
        # Found on the whole model, and not what the weights of either would be fitted to.
        whole = network("Conv1D" in method)
        with torch.no_grad():
            for param in whole.parameters():
                param.mul_(0.8)
        settings["grids"] = quantize_oneshot_(whole, grid="minmax", ignore=ignore, **settings)
    made = Quantizer(**settings, end=9, interval=2, targets=targets.targets)
    constraints = [made]
    if method == "pruned":
        constraints.append(Pruner(0.5, interval=2, end=6))
    for constraint in constraints:
        constraint.at(done, STEPS)
        constrain(optimizer, targets.parameters, constraint)
    return optimizer, constraints


def train(net, optimizer, constraints, first, last):
    for step in range(first, last):
        # Every rank sees the same batch, so that the mean over ranks is the batch of one process.
        x = torch.randn(32, 16, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (net(x) - 2 * x[:, :4]).square().mean().backward()
        for constraint in constraints:
            constraint.at(step + 1, STEPS)
        optimizer.step()


def compare(method):
    conv1d = "Conv1D" in method
    whole = network(conv1d)
    train(whole, *begin(whole, method), 0, STEPS)

    part = sharded(conv1d)
    optimizer, constraints = begin(part, method)
    train(part, optimizer, constraints, 0, STEPS // 2)
    # The state travels through torch's own calls into a new model, and training goes on.
    saved = get_optimizer_state_dict(part, optimizer)
    rest = sharded(conv1d)
    rest.load_state_dict(part.state_dict())
    train(rest, *begin(rest, method, saved, STEPS // 2), STEPS // 2, STEPS)
    expected = whole.state_dict()
    for name, value in rest.state_dict().items():
        assert value.full_tensor().equal(expected[name]), (method, name)


def refuse(net, message, **settings):
    """What the shards cut is refused, by all ranks."""
    targets = find_targets(net)
    made = Quantizer(4, targets=targets.targets, **settings)
    made.at(0, STEPS)
    with pytest.raises(ValueError, match=message):
        constrain(torch.optim.AdamW(net.parameters()), targets.parameters, made)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    for method in METHODS:
        compare(method)
    refuse(sharded(), "cut groups that share a scale", group_size="tensor")
    refuse(sharded(conv1d=True), "0.weight.*cut groups")
    broken = network()
    with torch.no_grad():
        broken[0].weight[0, 0] = torch.nan
    refuse(
        fully_shard(broken, mesh=init_device_mesh("cpu", (2,))), "0.weight holds weights that are not"
    )
    dist.destroy_process_group()
