"""Sharded parameters: the local part of a tensor, and counts summed over the ranks that share it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.placement_types import Shard


def local(tensor: Tensor) -> Tensor:
    """This rank's part of `tensor`; the tensor itself where it is not sharded. Shares storage."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def placed_as(weight: Tensor, part: Tensor, shape: Sequence[int]) -> Tensor:
    """This rank's `part` of a tensor of `shape`, which has the dimensions of `weight` and lies as it
    does; the part itself where `weight` is not sharded."""
    if not isinstance(weight, DTensor):
        return part
    size = torch.Size(shape)
    stride = torch.empty(size, device="meta").stride()
    return DTensor.from_local(
        part, weight.device_mesh, weight.placements, run_check=False, shape=size, stride=stride
    )


def cut_as(weight: Tensor, whole: Tensor) -> Tensor:
    """This rank's part of `whole`, which every rank holds and which has the dimensions of `weight`, cut
    as it is; all of it where `weight` is not sharded."""
    if not isinstance(weight, DTensor):
        return whole
    # Without a source, since nothing is to be sent.
    cut = distribute_tensor(whole, weight.device_mesh, weight.placements, src_data_rank=None)
    return cut.to_local()


def shard_groups(tensor: Tensor) -> tuple[dist.ProcessGroup, ...]:
    """The process groups over which `tensor` is cut; empty where every rank holds all of it."""
    if not isinstance(tensor, DTensor):
        return ()
    return tuple(
        tensor.device_mesh.get_group(dim)
        for dim, placement in enumerate(tensor.placements)
        if isinstance(placement, Shard)
    )


def sum_over_shards(counts: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Sum of pairs (local counts, the tensor they were counted on), each part counted once.

    One all-reduce for each way of sharding, whatever the number of tensors; none without shards.
    """
    by_groups: dict[tuple[dist.ProcessGroup, ...], Tensor] = {}
    for count, tensor in counts:
        groups = shard_groups(tensor)
        if groups in by_groups:
            by_groups[groups] += count
        else:
            by_groups[groups] = count.clone()
    for groups, count in by_groups.items():
        for group in groups:
            dist.all_reduce(count, group=group)
    return torch.stack(list(by_groups.values())).sum(0)


def count_in_earlier_shards(count: int, tensor: Tensor) -> int:
    """Sum of `count` over the ranks that hold earlier parts of `tensor`, cut along one mesh axis."""
    groups = shard_groups(tensor)
    if not groups:
        return 0
    (group,) = groups
    counts = torch.zeros(dist.get_world_size(group), dtype=torch.int64, device=local(tensor).device)
    counts[dist.get_rank(group)] = count
    dist.all_reduce(counts, group=group)
    return int(counts[: dist.get_rank(group)].sum())
