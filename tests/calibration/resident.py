"""Run as a process: prints by how many bytes and threads a layer that wastes memory makes it grow."""

import resource
from contextlib import closing
from pathlib import Path

import torch
from torch import nn

from hf_compress.calibration.lockstep import lockstep


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


def threads():
    return len(list(Path("/proc/self/task").iterdir()))


if __name__ == "__main__":
    torch.set_num_threads(2)
    batches = [{"x": torch.randn(1024, 64)} for _ in range(12)]
    model = Wasteful()
    model(**batches[0])  # the one team of threads, which any forward takes
    with closing(lockstep(model, batches, {"layer"})) as steps:
        before, team = resident_bytes(), threads()
        next(steps)
        print(resident_bytes() - before, threads() - team)
