"""What quantization would do to a model, told before it is done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from hf_compress.quantization.grids import scale_shape
from hf_compress.quantization.schemes import Scheme
from hf_compress.targets import Selection, counted


@dataclass(frozen=True)
class QuantizationPlan:
    """Weights to quantize with shape and scales, weights left as they are with the reason, and the size
    to expect. `str(plan)` is a table.

    bytes: of the model's parameters now; packed_bytes: with the codes of `bits` bits packed, their
    scales and zero points beside them.
    """

    quantized: Mapping[str, tuple[tuple[int, ...], int]]
    skipped: Mapping[str, str]
    bits: int
    parameters: int
    bytes: int
    packed_bytes: int

    @classmethod
    def of(cls, model: nn.Module, selection: Selection, scheme: Scheme) -> QuantizationPlan:
        """The plan of quantizing `selection` of `model` to `scheme`."""
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        quantized, packed = {}, size
        for name, target in selection.targets.items():
            param = target.param
            scales = scale_shape(
                param, input_dim=target.input_dim, group_size=scheme.group_size
            ).numel()
            quantized[name] = (tuple(param.shape), scales)
            codes = param.numel() if scheme.symmetric else param.numel() + scales
            packed += (codes * scheme.bits + 7) // 8 + (scales - param.numel()) * param.element_size()
        return cls(
            quantized=quantized,
            skipped=selection.skipped,
            bits=scheme.bits,
            parameters=sum(param.numel() for param in selection.parameters.values()),
            bytes=size,
            packed_bytes=packed,
        )

    def __str__(self) -> str:
        width = max(len(name) for name in self.quantized)
        rows = [
            f"  {name:{width}}  {'x'.join(map(str, shape)):>12}  {scales:,} scales"
            for name, (shape, scales) in self.quantized.items()
        ]
        return "\n".join(
            [
                f"quantized to {self.bits} bit: {len(self.quantized)} weights, "
                f"{self.parameters:,} parameters",
                *rows,
                f"left as they are: {len(self.skipped)} weights",
                *(f"  {reason}" for reason in counted(self.skipped)),
                f"Checkpoints of the training hold the values of the grid in full, "
                f"{self.bytes / 1e6:.1f} MB, and run no faster. Packed they take "
                f"{self.packed_bytes / 1e6:.1f} MB.",
            ]
        )
