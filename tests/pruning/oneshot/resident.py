"""Run as a process: prints by how many bytes a pass over a layer makes it grow that wastes memory."""

import resource
from contextlib import closing
from pathlib import Path

import torch
from torch import nn

from hf_compress.pruning.oneshot.lockstep import lockstep


class Wasteful(nn.Module):
    """Frees nearly all that it allocates, in an order that leaves holes, and holds 256 bytes a row."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, x):
        pieces = [x.repeat(1, 16).add_(i) for i in range(16)]
        held = torch.stack([piece.mean(1) for piece in pieces]).mean(0)
        del pieces
        return self.layer(x + held[:, None])


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


if __name__ == "__main__":
    torch.set_num_threads(1)  # each thread of torch's own keeps a stack, on any number of cores
    batches = [{"x": torch.randn(1024, 64)} for _ in range(12)]
    with closing(lockstep(Wasteful(), batches, {"layer"})) as steps:
        before = resident_bytes()
        next(steps)
        print(resident_bytes() - before)
