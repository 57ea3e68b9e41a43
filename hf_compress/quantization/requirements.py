"""What a weight must be like to be trained on a grid."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hf_compress.distributed import local, sum_over_shards
from hf_compress.quantization.grids import GroupSize, check_divides, check_finite


def check_weight(
    name: str, param: nn.Parameter, *, input_dim: int, group_size: GroupSize, learn_scale: bool
) -> None:
    """Raises ValueError for a weight that is not finite, that `group_size` does not divide, whose
    groups are cut into shards, or whose dtype is too coarse to learn a scale in."""
    check_divides(name, param, input_dim=input_dim, group_size=group_size)
    _check_shards(name, param, input_dim=input_dim, group_size=group_size)
    check_finite(name, param)
    if learn_scale and param.dtype != torch.float32:
        raise ValueError(
            f"{name} is {param.dtype}, too coarse to learn a scale in: train in float32, where "
            "`bf16=True` still computes in bfloat16; or leave `learn_scale` out."
        )


def _check_shards(name: str, weight: Tensor, *, input_dim: int, group_size: GroupSize) -> None:
    part = local(weight)
    if group_size == "tensor":
        cut = part.shape[-2:] != weight.shape[-2:]
    else:
        cut = part.shape[input_dim] % (group_size or weight.shape[input_dim]) != 0
    # Summed over the ranks, so that all of them refuse.
    if sum_over_shards([(torch.tensor(int(cut), device=part.device), weight)]) > 0:
        raise ValueError(
            f"the shards of {name} {tuple(weight.shape)} cut groups that share a scale: choose a "
            "`group_size` that divides them, use DDP, or leave it out by `ignore`."
        )
