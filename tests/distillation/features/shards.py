"""Run by two ranks: matches of a student cut into FSDP2 shards against the whole one. Exits 0 when loss
and gradients are equal."""

import copy
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

sys.path.insert(0, str(Path(__file__).parents[2]))
from distillation.features.pairs import make, match_loss

from hf_compress import Match

MATCHES = [Match("hidden"), Match("attention"), Match("embeddings"), Match("values")]


def compare():
    whole, teacher, batch = make("bert")
    sharded = copy.deepcopy(whole)
    mesh = init_device_mesh("cpu", (2,))
    for layer in sharded.bert.encoder.layer:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    losses = [match_loss(model, teacher, batch, MATCHES) for model in (whole, sharded)]
    torch.testing.assert_close(losses[1], losses[0])
    for loss in losses:
        loss.backward()
    pairs = zip(whole.named_parameters(), sharded.parameters(), strict=True)
    for (name, ours), theirs in pairs:
        if ours.grad is not None:
            torch.testing.assert_close(theirs.grad.full_tensor(), ours.grad, msg=name)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    compare()
    dist.destroy_process_group()
