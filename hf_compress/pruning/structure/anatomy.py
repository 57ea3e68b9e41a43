"""What units are: which parts of a model's weights each owns, and where it is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_compress.pruning.structure.architectures import Kind


@dataclass(frozen=True)
class Slice:
    """Of the parameter `name`, unit u owns the entries from u * width on, along dimension `dim`."""

    name: str
    param: nn.Parameter
    dim: int
    width: int

    def entries(self, units: Sequence[int] | Tensor) -> Tensor:
        """Indices along `dim` of the entries of `units`, on the device of the parameter."""
        units = torch.as_tensor(units, dtype=torch.long, device=self.param.device)
        offsets = torch.arange(self.width, device=self.param.device)
        return (units[:, None] * self.width + offsets).flatten()

    def by_unit(self, values: Tensor) -> Tensor:
        """Sums (units,) of `values`, of the parameter's shape, over what each unit owns."""
        return values.movedim(self.dim, 0).reshape(values.shape[self.dim] // self.width, -1).sum(1)


@dataclass(frozen=True, kw_only=True)
class Units:
    """The units of one kind in one place, of which equally many must go everywhere.

    name: the module that reads them, with * for the layer where all layers share them; for layers
        the name of their list; for hidden features the embedding.
    fields: the config fields that count them; all shrink in proportion.
    slices: what each unit owns; empty for layers.
    readers: the modules whose input they are; routers for experts; the layers themselves for layers.
    masks: of each reader the mask of its stack, see `Stack`.
    pinned: names of what stays in the first layer, for layers.
    rescaled: parameters that grow by the root of what the number of units shrinks by.
    """

    name: str
    kind: Kind
    count: int
    fields: tuple[str, ...]
    slices: tuple[Slice, ...]
    readers: tuple[str, ...]
    masks: tuple[str | None, ...]
    pinned: str | None = None
    rescaled: tuple[str, ...] = ()

    @property
    def reading(self) -> tuple[Slice, ...]:
        """Of each reader the slice of its matrix, whose columns are what the units do; of norms, of
        their weight."""
        if self.kind not in ("ffn", "heads", "hidden"):
            return ()
        return tuple(s for s in self.slices if s.name.removesuffix(".weight") in self.readers)


def name_of(model: nn.Module, wanted: nn.Module) -> str:
    """The name of a module of the model."""
    return next(name for name, module in model.named_modules() if module is wanted)
