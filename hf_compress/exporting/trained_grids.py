"""The integers of a training in an ONNX file: QDQ, from its codes and scales."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from transformers.exporters import ExportQuantizer
from transformers.exporters.configs import ExportFormat

from hf_compress.quantization.codes import codes_of, group_size_of
from hf_compress.quantization.grids import Grid

if TYPE_CHECKING:
    import onnx_ir


class TrainedGrids(ExportQuantizer):
    """Stores weights that lie on `grids` as their codes and scales, each behind a DequantizeLinear.

    Nothing is rounded: what it gives is the weight of the training. Inputs of layers stay floats.
    """

    # The members of their StrEnum are typed as plain strings.
    supported_formats = (ExportFormat.ONNX,)  # type: ignore[assignment]
    required_packages = ("onnx", "onnx_ir")

    def __init__(self, grids: Mapping[str, Grid]):
        super().__init__()
        self.grids = grids

    def quantize(
        self, model: onnx_ir.Model, sample_inputs: dict[str, Any], export_format: ExportFormat
    ) -> onnx_ir.Model:
        """Raises ValueError where a weight is not in the graph under its name, or not on its grid."""
        graph = model.graph
        if missing := sorted(self.grids.keys() - graph.initializers.keys()):
            raise ValueError(
                f"{len(missing)} weights are not in the exported graph, {missing[0]} the first: pass "
                "`bits=8`, which rounds anew, or `bits=32`."
            )
        for name, grid in self.grids.items():
            _replace(graph, name, grid)
        return model


def _replace(graph: onnx_ir.Graph, name: str, grid: Grid) -> None:
    import onnx_ir as ir

    value = graph.initializers[name]
    assert value.const_value is not None
    weight = torch.from_numpy(value.const_value.numpy())
    codes = codes_of(name, weight, grid, input_dim=1)
    size = group_size_of(name, weight, grid, input_dim=1)
    scale, zero = grid.scale, grid.zero_point
    attributes: dict[str, Any] = {}
    if size == "tensor":
        scale, zero = scale.reshape(()), None if zero is None else zero.reshape(())
    elif size is None:
        scale, zero = scale.reshape(-1), None if zero is None else zero.reshape(-1)
        attributes["axis"] = 0
    else:
        attributes |= {"axis": 1, "block_size": size}
    integers = ir.DataType.INT4 if grid.bits <= 4 else ir.DataType.INT8
    stored = [("codes", codes, integers), ("scale", scale.float(), ir.DataType.FLOAT)]
    if zero is not None:
        stored.append(("zero_point", zero.to(torch.int8), integers))
    inputs = []
    for key, tensor, dtype in stored:
        constant = ir.Value(
            name=f"{name}_{key}",
            shape=ir.Shape(tensor.shape),
            type=ir.TensorType(dtype),
            const_value=ir.tensor(tensor.contiguous().numpy(), dtype=dtype, name=f"{name}_{key}"),
        )
        graph.register_initializer(constant)
        inputs.append(constant)
    node = ir.node("DequantizeLinear", inputs, attributes=attributes)
    graph.insert_before(graph[0], node)
    ir.convenience.replace_all_uses_with(value, node.outputs[0])
    del graph.initializers[name]
