"""A small network that is trained on a grid, as the suites of this folder share it."""

import torch
from torch import nn

from hf_compress.constraint import constrain
from hf_compress.quantization.grids import grouped
from hf_compress.quantization.quantizer import Quantizer
from hf_compress.targets import find_targets

STEPS = 40


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).to(dtype)


def quantizer(net, bits=4, *, done=0, total=STEPS, **settings):
    made = Quantizer(bits, targets=find_targets(net).targets, **settings)
    made.at(done, total)
    return made


def weights(net):
    return find_targets(net).parameters


def adamw(net):
    return torch.optim.AdamW(net.parameters(), lr=1e-2)


def train(net, optimizer, constraints, first=0, last=STEPS, total=STEPS):
    for step in range(first, last):
        x = torch.randn(64, 16, generator=torch.Generator().manual_seed(step)).to(net[0].weight.dtype)
        optimizer.zero_grad()
        (net(x) - 2 * x[:, :4]).square().mean().backward()
        for constraint in constraints:
            constraint.at(step + 1, total)
        optimizer.step()


def train_on_grid(net, made, **settings):
    optimizer = adamw(net)
    constrain(optimizer, weights(net), made)
    train(net, optimizer, [made], **settings)
    return optimizer


def levels(net, group_size=None):
    """The most distinct values in one group of any weight."""
    groups = [grouped(w, input_dim=1, group_size=group_size) for w in weights(net).values()]
    return max(len(group.unique()) for weight in groups for group in weight.flatten(0, -2))
