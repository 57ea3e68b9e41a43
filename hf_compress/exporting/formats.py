"""Exports by `transformers.exporters`, each run in its own runtime."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import transformers
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import GraphModule
from transformers import PreTrainedModel

from hf_compress.devices import cpu_flags, host
from hf_compress.quantization.grids import Grid

if TYPE_CHECKING:
    from transformers.exporters import ExportedModel, ExportQuantizer

GROUPED_OPSET = 21  # the first in which a DequantizeLinear has groups, and 4 bits
Format = Literal["onnx", "openvino", "executorch"]
Batch = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """What runs a format.

    packages: that export to it and run it, and in `extra` of pyproject. int8: what is done for 8 bits.
    calibrated: whether that reads rows. dynamic: whether a program takes batches of any size and
    length; else those of its example.
    """

    packages: tuple[str, ...]
    extra: str
    int8: str
    calibrated: bool
    dynamic: bool


RUNTIMES: dict[Format, Runtime] = {
    "onnx": Runtime(
        packages=("onnx", "onnxscript", "onnxruntime"),
        extra="export-onnx",
        int8="rounded anew by ONNX Runtime, dynamic: weights by output feature, inputs in each pass",
        calibrated=False,
        dynamic=True,
    ),
    "openvino": Runtime(
        packages=("openvino", "nncf"),
        extra="export-openvino",
        int8="rounded anew by NNCF, static: ranges from rows of calibration; floats that stay are "
        "computed in bf16 where the CPU has it",
        calibrated=True,
        dynamic=True,
    ),
    "executorch": Runtime(
        packages=("executorch", "torchao"),
        extra="export-executorch",
        int8="rounded anew by PT2E for XNNPACK, static, in Linear and convolution layers: ranges from "
        "rows of calibration",
        calibrated=True,
        dynamic=False,
    ),
}


def check_installed(format: Format) -> None:
    """Raises ImportError where a package of `format` is missing, with what to install."""
    runtime = RUNTIMES[format]
    missing = [name for name in runtime.packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f'format "{format}" needs {" and ".join(missing)}: '
            f'pip install "hf-compress[{runtime.extra}]"'
        )
    if importlib.util.find_spec("transformers.exporters") is None:
        raise ImportError(f"transformers {transformers.__version__} has no exporters: take 5.23.")


def export(
    model: PreTrainedModel,
    format: Format,
    inputs: Batch,
    *,
    bits: int = 32,
    calibration: Sequence[Batch] = (),
    grids: Mapping[str, Grid] | None = None,
) -> ExportedModel:
    """`model` as a program of `format`, not saved yet.

    inputs: a batch, as it is called; of more than one row where the format takes any number.
    bits: 32, or 8: see `Runtime.int8`. With `grids`, by the names of weights that lie on them, ONNX
        gets the integers and scales of these instead, and computes in floats.
    calibration: batches as `inputs`, of which the ranges of static integers are taken.

    Raises ValueError for other `bits`, and 8 bits without the calibration that the format needs.
    """
    if bits not in (32, 8):
        raise ValueError(f"`bits` is {bits}; {format} takes 32, or 8 for integers.")
    if bits == 8 and RUNTIMES[format].calibrated and not calibration:
        raise ValueError(f"8 bits of {format} need rows of calibration: pass a dataset.")
    from transformers.exporters.auto import AutoExportConfig, AutoHfExporter

    settings: dict[str, Any] = {"export_format": format}
    if RUNTIMES[format].dynamic:
        shapes = {name: _axes(value) for name, value in inputs.items()}
        settings |= {"dynamic": True, "dynamic_shapes": shapes}
    if grids:
        from hf_compress.exporting.trained_grids import TrainedGrids

        # Names of weights survive only where nothing is folded.
        settings |= {"quantizer": TrainedGrids(grids), "optimize": False}
        settings["opset_version"] = GROUPED_OPSET
    elif bits == 8:
        settings["quantizer"] = _int8(format, [dict(batch) for batch in calibration])
    example: dict[str, Any] = dict(inputs)
    if model.can_generate():
        example["use_cache"] = False
    config = AutoExportConfig.from_dict(settings)
    return AutoHfExporter.from_config(config).export(model, example, config)


def load(
    folder: str | Path, format: Format, *, bits: int = 32, threads: int | None = None
) -> ExportedModel:
    """What `export` made and `save_pretrained` wrote to `folder`, in its runtime on the CPU.

    threads: of ONNX Runtime and OpenVINO; ExecuTorch decides itself. In OpenVINO floats of 32 bits are
    computed as such, and not in bf16, which is its default where the CPU has it, and stays so for 8.
    """
    from transformers.exporters import ExportedModel

    settings: dict[str, Any] = {}
    if format == "onnx" and threads is not None:
        from onnxruntime import SessionOptions

        options = SessionOptions()
        options.intra_op_num_threads = threads
        # Threads that wait busily after a run would slow whatever runs next.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        settings["session_options"] = options
    elif format == "openvino":
        settings["config"] = {"INFERENCE_PRECISION_HINT": "f32"} if bits == 32 else {}
        if threads is not None:
            settings["config"]["INFERENCE_NUM_THREADS"] = threads
    return ExportedModel.from_pretrained(folder, device=host(), **settings)


def _axes(value: Tensor) -> dict[int, Any]:
    """Those that differ from batch to batch: rows, and the length of text and raw sound."""
    return dict.fromkeys(range(2 if value.dim() == 2 else 1), Dim.AUTO)


def _int8(format: Format, calibration: list[dict[str, Any]]) -> ExportQuantizer:
    # Each imports its packages.
    if format == "onnx":
        from transformers.exporters import OnnxRuntimeDynamicConfig, OnnxRuntimeQuantizer

        # Without these instructions sums of 8 times 8 bits overflow.
        narrow = not any("vnni" in flag or "amx" in flag for flag in cpu_flags())
        return OnnxRuntimeQuantizer(OnnxRuntimeDynamicConfig(per_channel=True, reduce_range=narrow))
    if format == "openvino":
        from transformers.exporters import NNCFOpenVINOQuantizer, NNCFQuantizationConfig

        # By default it asks for 300 batches, and warns of fewer.
        return NNCFOpenVINOQuantizer(
            NNCFQuantizationConfig(subset_size=len(calibration)), calibration_dataset=calibration
        )
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from transformers.exporters import PT2EQuantizer

    scheme = get_symmetric_quantization_config(is_per_channel=True)

    class Layers(XNNPACKQuantizer):
        """Of layers alone: sums and products with a scalar stay as they are, which would become floats,
        even of the integers by which masks are indexed."""

        def transform_for_annotation(self, model: GraphModule) -> GraphModule:
            return model

    quantizer = Layers()
    for kind in (nn.Linear, nn.Conv1d, nn.Conv2d):
        quantizer.set_module_type(kind, scheme)
    return PT2EQuantizer(quantizer, calibration_dataset=calibration)
