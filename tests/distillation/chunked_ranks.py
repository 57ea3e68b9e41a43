"""Run by two ranks: the loss in chunks of a student under DDP and FSDP2, against the whole logits of a
student that is not wrapped. Exits 0 when values and gradients are equal."""

import copy
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny import language_rows, tiny_llama

from hf_compress.distillation.divergences import Divergence
from hf_compress.distillation.objective import Objective, mixed
from hf_compress.distillation.tasks.heads import head_of
from hf_compress.distillation.teachers import FrozenTeacher

SPREAD = {"initializer_range": 0.3}
ROWS = 4


def replicated(model):
    return DistributedDataParallel(model)


def replicated_with_unused(model):
    """DDP walks from the outputs to the parameters, and waits for no others."""
    return DistributedDataParallel(model, find_unused_parameters=True)


def sharded(model):
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def sharded_head(model):
    """The weights of the output layer are whole while it runs, and not before nor after."""
    fully_shard(model.lm_head, mesh=init_device_mesh("cpu", (2,)))
    return sharded(model)


def loss_of(model, teacher, batch, chunk_size):
    objective = Objective(head_of(teacher), [FrozenTeacher(teacher)], [1.0], nullcontext, chunk_size)
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    objective.prepare(model, batch)
    divergence = Divergence(temperature=2.0)
    sums, outputs = objective.sums(model, batch, divergence=divergence, alpha=0.4)
    assert (outputs.logits.shape[1] == 0) == (chunk_size is not None), outputs.logits.shape
    assert not inner._forward_hooks or isinstance(inner, FSDPModule)
    return mixed(sums, sums.items, 0.4)


def gradient(parameter):
    grad = parameter.grad
    return grad.full_tensor() if isinstance(grad, DTensor) else grad


def compare(wrap, *, tied=False, shard_teacher=False, steps=2):
    whole = tiny_llama(tie_word_embeddings=tied, **SPREAD)
    teacher = tiny_llama(seed=1, layers=3, **SPREAD).requires_grad_(False)
    wrapped = wrap(copy.deepcopy(whole))
    given = sharded(copy.deepcopy(teacher)) if shard_teacher else teacher
    rows = language_rows(rows=2 * ROWS).with_format("torch")
    parts = [rows[rank * ROWS : (rank + 1) * ROWS] for rank in range(2)]
    for _ in range(steps):
        losses = [loss_of(whole, teacher, batch, None) for batch in parts]
        (sum(losses) / 2).backward()
        ours = loss_of(wrapped, given, parts[dist.get_rank()], 5)
        ours.backward()
        torch.testing.assert_close(ours, losses[dist.get_rank()])
        pairs = zip(whole.named_parameters(), wrapped.parameters(), strict=True)
        for (name, expected), measured in pairs:
            torch.testing.assert_close(gradient(measured), expected.grad, msg=name)
            with torch.no_grad():
                for parameter in (expected, measured):
                    parameter -= 0.1 * parameter.grad
                    parameter.grad = None


if __name__ == "__main__":
    dist.init_process_group("gloo")
    for wrap in (replicated, replicated_with_unused, sharded):
        compare(wrap)
        compare(wrap, tied=True)
    compare(sharded_head)
    compare(sharded_head, shard_teacher=True)
    dist.destroy_process_group()
