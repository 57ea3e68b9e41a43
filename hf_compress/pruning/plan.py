"""What pruning would do to a model, told before it is done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from hf_compress.targets import Selection, counted


@dataclass(frozen=True)
class Plan:
    """Weights to prune with shape and sparsity, weights left dense with the reason, and what to
    expect of it. `str(plan)` is a table."""

    pruned: Mapping[str, tuple[tuple[int, ...], float]]
    skipped: Mapping[str, str]
    parameters: int
    zeros: int
    bytes: int

    @classmethod
    def of(cls, model: nn.Module, selection: Selection, fractions: Mapping[str, float]) -> Plan:
        """The plan of pruning `selection` of `model` to `fractions`, by name of the weight."""
        return cls(
            pruned={n: (tuple(p.shape), fractions[n]) for n, p in selection.parameters.items()},
            skipped=selection.skipped,
            parameters=sum(p.numel() for p in model.parameters()),
            zeros=sum(round(fractions[n] * p.numel()) for n, p in selection.parameters.items()),
            bytes=sum(p.numel() * p.element_size() for p in model.parameters()),
        )

    def __str__(self) -> str:
        width = max(len(name) for name in self.pruned)
        rows = [
            f"  {name:{width}}  {'x'.join(map(str, shape)):>12}  {sparsity:.4g}"
            for name, (shape, sparsity) in self.pruned.items()
        ]
        return "\n".join(
            [
                f"pruned: {len(self.pruned)} weights, to (ranked together: on average) a sparsity of",
                *rows,
                f"left dense: {len(self.skipped)} weights",
                *(f"  {reason}" for reason in counted(self.skipped)),
                f"{self.zeros:,} of {self.parameters:,} parameters become zero "
                f"({self.zeros / self.parameters:.1%} of all).",
                f"Zeros are stored dense: the file stays at {self.bytes / 1e6:.1f} MB, and dense "
                "kernels do not run faster.",
            ]
        )
