"""The integers of a training in the blocks of a GGUF file.

A converter rounds weights by its own scales. Weights that lie on a grid already keep their codes, where
the grid is one of those that blocks have: symmetric, of 4 or 8 bits, each scale for 32 inputs or some
times as many.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_compress.quantization.codes import codes_of
from hf_compress.quantization.grids import Grid

BLOCK = 32
_ROUNDING = 2**-10  # of a scale in 16 bits, relative, and as much again for the product
_OTHER_ROWS = 0.5  # rounding to 4 bits alone changes weights by some tenths of this, relative


def fits(model: PreTrainedModel, grids: Mapping[str, Grid]) -> bool:
    """Whether blocks hold weights on `grids` as they are: all are symmetric and of 4 or of 8 bits, and
    their groups divide into blocks."""
    return (
        {grid.bits for grid in grids.values()} in ({4}, {8})
        and all(grid.zero_point is None for grid in grids.values())
        and all(
            model.get_parameter(name).shape[1] % (BLOCK * grid.scale.shape[-1]) == 0
            for name, grid in grids.items()
        )
    )


def write_codes(file: Path, model: PreTrainedModel, grids: Mapping[str, Grid], kind: str) -> None:
    """Writes the codes and scales of the weights of `model` that lie on `grids` over those in `file`.

    kind: of their blocks there, "Q4_0" or "Q8_0".

    Raises ValueError where the file does not have one of them as such blocks, or would not have its
    values within the rounding of a scale to 16 bits.
    """
    from gguf import GGUFReader, dequantize

    stored = _by_names(GGUFReader(file, "r+"), model)
    for name, grid in grids.items():
        weight = model.get_parameter(name).detach().float()
        tensor = stored.get(name)
        if tensor is None or tensor.tensor_type.name != kind:
            as_what = tensor.tensor_type.name if tensor is not None else "nothing"
            raise ValueError(
                f"the converter wrote {name} as {as_what} where {kind} would hold its integers: pass "
                "`bits`, and all weights are rounded anew."
            )
        rows = _rows(name, weight, dequantize(tensor.data, tensor.tensor_type), model)
        tensor.data[:] = _blocks(name, weight, grid)[rows]
        found = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type))
        if not torch.allclose(found, weight[rows], rtol=_ROUNDING, atol=0):
            raise ValueError(
                f"the scales of {name} do not fit the 16 bits that {kind} has for them: pass `bits`, "
                "and all weights are rounded anew."
            )
        tensor.data.flush()


def _by_names(reader: Any, model: PreTrainedModel) -> dict[str, Any]:
    """The tensors of a file by the names that they have in the model."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    field = reader.get_field("general.architecture")
    arch = next(key for key, name in MODEL_ARCH_NAMES.items() if name == field.contents())
    names = get_tensor_name_map(arch, model.config.get_text_config().num_hidden_layers)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    found = {
        name: names.get_name(name, try_suffixes=(".weight",)) for name, _ in model.named_parameters()
    }
    return {name: tensors[known] for name, known in found.items() if known in tensors}


def _rows(name: str, weight: Tensor, found: np.ndarray, model: PreTrainedModel) -> Tensor:
    """The order in which the file has the rows of `weight`: that in which it is closest to what was
    `found` there."""
    orders = list(_orders(weight, model))
    errors = [float((weight[rows] - torch.from_numpy(found)).norm() / weight.norm()) for rows in orders]
    best = min(range(len(orders)), key=errors.__getitem__)
    if not errors[best] < _OTHER_ROWS:
        raise ValueError(
            f"the file does not have {name} in an order of rows that is known: pass `bits`."
        )
    return orders[best]


def _orders(weight: Tensor, model: PreTrainedModel) -> Iterator[Tensor]:
    """As they are, or as queries and keys of Llama are stored: of each head the two halves in turn."""
    rows = torch.arange(len(weight))
    yield rows
    config = model.config.get_text_config()
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, name, None)
        if heads and len(rows) % (2 * heads) == 0:
            yield rows.view(heads, 2, -1).transpose(1, 2).flatten()


def _blocks(name: str, weight: Tensor, grid: Grid) -> Tensor:
    """(outputs, bytes of the blocks of a row): of each block the scale in 16 bits, then 32 bytes, or 16
    of which the low halves are the first 16 codes."""
    codes = codes_of(name, weight, grid, input_dim=1).unflatten(1, (-1, BLOCK))
    scales = grid.scale.expand(len(weight), -1)
    scales = scales.repeat_interleave(codes.shape[1] // scales.shape[1], dim=1)
    if grid.bits == 4:
        low, high = (codes + 8).view(torch.uint8).chunk(2, dim=-1)
        written = low | high << 4
    else:
        written = codes.view(torch.uint8)
    heads = scales.to(torch.float16).unsqueeze(-1).view(torch.uint8)
    return torch.cat([heads, written], dim=-1).flatten(1)
