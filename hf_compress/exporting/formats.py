"""Exports by `transformers.exporters`, and as GGUF, each run in its own runtime."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import transformers
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import GraphModule
from transformers import PreTrainedModel

from hf_compress.devices import cpu_flags, host
from hf_compress.exporting.gguf import KINDS, write_gguf
from hf_compress.exporting.gguf_blocks import fits
from hf_compress.exporting.llama_cpp import LlamaCpp
from hf_compress.quantization.grids import Grid

if TYPE_CHECKING:
    from transformers.exporters import ExportQuantizer

GROUPED_OPSET = 21  # the first in which a DequantizeLinear has groups, and 4 bits
Format = Literal["onnx", "openvino", "executorch", "gguf"]
Batch = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """What runs a format.

    packages: that export to it and run it, by their modules, and in `extra` of pyproject. weights: what
    is done to them, by the bits that the format has, its default first. kept: how it computes with
    weights that keep the integers of a training; None where it keeps none. calibrated: whether 8 bits
    read rows. dynamic: whether a program takes batches of any size and length; else those of its
    example. cached: whether it continues a text without computing it again.
    """

    packages: Mapping[str, str]
    extra: str
    weights: Mapping[int, str]
    kept: str | None = None
    calibrated: bool = False
    dynamic: bool = True
    cached: bool = False


_FLOATS = "floats of 32 bits"

RUNTIMES: dict[Format, Runtime] = {
    "onnx": Runtime(
        packages={name: name for name in ("onnx", "onnxscript", "onnxruntime")},
        extra="export-onnx",
        weights={
            32: _FLOATS,
            8: "rounded anew by ONNX Runtime, dynamic: weights by output feature, inputs in each pass",
        },
        kept="inputs in floats",
    ),
    "openvino": Runtime(
        packages={name: name for name in ("openvino", "nncf")},
        extra="export-openvino",
        weights={
            32: _FLOATS,
            8: "rounded anew by NNCF, static: ranges from rows of calibration; floats that stay are "
            "computed in bf16 where the CPU has it",
        },
        calibrated=True,
    ),
    "executorch": Runtime(
        packages={name: name for name in ("executorch", "torchao")},
        extra="export-executorch",
        weights={
            32: _FLOATS,
            8: "rounded anew by PT2E for XNNPACK, static, in Linear and convolution layers: ranges "
            "from rows of calibration",
        },
        calibrated=True,
        dynamic=False,
    ),
    "gguf": Runtime(
        packages={"auto_round": "auto-round", "gguf": "gguf", "llama_cpp": "llama-cpp-python"},
        extra="export-gguf",
        weights={
            bits: f"rounded anew to {kind} by AutoRound's converter, embeddings by llama.cpp's rules; "
            "inputs to 8 bits in each pass"
            for bits, kind in KINDS.items()
        },
        kept="their scales in 16 bits, embeddings by llama.cpp's rules; inputs to 8 bits in each pass",
        cached=True,
    ),
}


def check_installed(format: Format) -> None:
    """Raises ImportError where a package of `format` is missing, with what to install."""
    runtime = RUNTIMES[format]
    missing = [
        package
        for module, package in runtime.packages.items()
        if importlib.util.find_spec(module) is None
    ]
    if missing:
        raise ImportError(
            f'format "{format}" needs {" and ".join(missing)}: '
            f'pip install "hf-compress[{runtime.extra}]"'
        )
    if format != "gguf" and importlib.util.find_spec("transformers.exporters") is None:
        raise ImportError(f"transformers {transformers.__version__} has no exporters: take 5.23.")


def keeps(format: Format, model: PreTrainedModel, grids: Mapping[str, Grid]) -> bool:
    """Whether an export in `format` can have weights of `model` on `grids` as their integers."""
    if not grids or RUNTIMES[format].kept is None:
        return False
    return format != "gguf" or fits(model, grids)


def export(
    model: PreTrainedModel,
    format: Format,
    place: str | Path,
    inputs: Batch,
    *,
    tokenizer: str | Path,
    bits: int,
    calibration: Sequence[Batch] = (),
    grids: Mapping[str, Grid] | None = None,
) -> None:
    """Writes `model` as a program of `format` to the folder `place`.

    inputs: a batch, as it is called; of more than one row where the format takes any number.
    tokenizer: the folder of it, which GGUF holds too.
    bits: see `Runtime.weights`. grids: by the names of weights that lie on them, which keep their
        integers: see `keeps`.
    calibration: batches as `inputs`, of which the ranges of static integers are taken.

    Raises ValueError for other `bits`, 8 bits without the calibration that the format needs, and what
    cannot be GGUF.
    """
    weights = RUNTIMES[format].weights
    if not grids and bits not in weights:
        raise ValueError(f"`bits` is {bits}; {format} takes {' or '.join(map(str, weights))}.")
    if not grids and bits == 8 and RUNTIMES[format].calibrated and not calibration:
        raise ValueError(f"8 bits of {format} need rows of calibration: pass a dataset.")
    if format == "gguf":
        write_gguf(model, tokenizer, place, bits=bits, grids=grids)
        return
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
    AutoHfExporter.from_config(config).export(model, example, config).save_pretrained(place)


def load(
    folder: str | Path, format: Format, *, bits: int = 32, threads: int | None = None
) -> Callable[..., Any]:
    """What `export` wrote to `folder`, in its runtime on the CPU: takes a batch as keywords, and gives
    what has its `logits`.

    threads: of the runtime; ExecuTorch decides itself. In OpenVINO floats of 32 bits are
    computed as such, and not in bf16, which is its default where the CPU has it, and stays so for 8.
    """
    if format == "gguf":
        (file,) = Path(folder).glob("*.gguf")
        return LlamaCpp(file, threads=threads)
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
