"""What a model weighs and how fast it is, on this machine, as JSON."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

import hf_compress
from hf_compress.devices import hardware
from hf_compress.latency import Latency

_SHOULD_BE_LOW = re.compile(r"(^|_)(loss|perplexity|wer|cer|mae|mse|rmse|error)(_|$)")


@dataclass(frozen=True)
class Weights:
    """Number of weights and of non-zero ones; `by_name` has both for each tensor."""

    parameters: int
    nonzeros: int
    by_name: dict[str, tuple[int, int]]


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One model. None means not measured; metrics as the Trainer names them, without `eval_`.

    bytes: of the weight files. weight_bytes: of its weights and buffers in memory, after a forward.
    """

    parameters: int
    nonzeros: int
    bytes: int
    weight_bytes: int | None = None
    peak_memory_bytes: int | None = None
    latency: Latency | None = None
    metrics: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class CompressionReport:
    """A compressed model beside the dense one, measured in the same way in the same run."""

    compressed: Measurement
    dense: Measurement | None
    environment: dict[str, Any]

    def recovery(self, metric: str) -> float | None:
        """Compressed over dense in percent; dense over compressed for losses, error rates and
        perplexity, which should be low. None where the dense model was not measured, or for x / 0.
        """
        if self.dense is None or metric not in self.dense.metrics:
            return None
        above, below = self.compressed.metrics[metric], self.dense.metrics[metric]
        if _SHOULD_BE_LOW.search(metric):
            above, below = below, above
        return 100 * above / below if below else None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def count_weights(model: nn.Module) -> Weights:
    """Counts the parameters of `model` and the non-zero ones among them, tied tensors once.

    Weights packed by bitsandbytes count as what they stand for: two in a byte of 4-bit codes.
    """
    by_name = {}
    for name, parameter in model.named_parameters():
        weight = _unpacked(parameter)
        by_name[name] = (weight.numel(), int(torch.count_nonzero(weight)))
    return Weights(
        parameters=sum(total for total, _ in by_name.values()),
        nonzeros=sum(nonzeros for _, nonzeros in by_name.values()),
        by_name=by_name,
    )


def bytes_in_memory(model: PreTrainedModel) -> int:
    """Bytes of the parameters and buffers of `model` as they are now, and of the scales of those that
    bitsandbytes has packed."""
    total: int = model.get_memory_footprint()
    for parameter in model.parameters():
        state, scales = getattr(parameter, "quant_state", None), getattr(parameter, "SCB", None)
        while state is not None:
            kept = (state.absmax, state.code, getattr(state, "offset", None))
            total += sum(tensor.nbytes for tensor in kept if tensor is not None)
            state = state.state2
        total += 0 if scales is None else scales.nbytes
    return total


def bytes_on_disk(folder: str | Path) -> int:
    """Bytes of the safetensors files in `folder`. Raises FileNotFoundError when there are none."""
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} has no *.safetensors file: save the model there first.")
    return sum(file.stat().st_size for file in files)


_CHILD = """
import json, sys
import torch, transformers
from safetensors.torch import load_file
from hf_compress.devices import own_device, peak_allocated

def highest():
    # Not getrusage: on Linux its peak is inherited from the parent.
    if sys.platform != "linux":
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

folder, class_name, inputs = sys.argv[1:]
kind = getattr(transformers, class_name)  # imports what it needs
if sys.platform == "linux":
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the highest is from now on
idle = highest()
model = kind.from_pretrained(folder).eval()
device = own_device()
if getattr(model, "quantization_method", None) is None:
    model.to(device)
with torch.no_grad():
    model(**{name: value.to(device) for name, value in load_file(inputs).items()})
allocated = peak_allocated(device)
print(json.dumps(highest() - idle if allocated is None else allocated))
"""


def peak_memory(folder: str | Path, class_name: str, inputs: Mapping[str, Tensor]) -> int:
    """Bytes that loading `folder` and one forward pass of `inputs` take at their highest.

    A fresh process loads the model as `transformers.<class_name>`. On a GPU it is the peak that torch
    allocated; on CPU the growth of the resident set over that of the interpreter with torch and
    transformers imported.

    Raises FileNotFoundError when the folder holds no weights, and RuntimeError with the last lines of
    the process when it fails, and on Windows, which does not tell the peak.
    """
    bytes_on_disk(folder)
    if sys.platform == "win32":
        raise RuntimeError("Windows does not tell the peak resident set of a process.")
    with tempfile.TemporaryDirectory() as temporary:
        file = str(Path(temporary) / "inputs.safetensors")
        save_file({name: value.cpu().contiguous() for name, value in inputs.items()}, file)
        run = subprocess.run(
            [sys.executable, "-c", _CHILD, str(folder), class_name, file],
            capture_output=True,
            text=True,
        )
    if run.returncode != 0:
        raise RuntimeError(f"Loading {folder} in a fresh process failed:\n{run.stderr[-2000:]}")
    return int(json.loads(run.stdout.splitlines()[-1]))


def environment() -> dict[str, Any]:
    """The hardware and the versions that measurements hold for."""
    packages = (
        *("torch", "transformers", "accelerate", "safetensors", "datasets"),
        *("bitsandbytes", "compressed-tensors", "torchao", "peft"),
    )
    return {
        **hardware(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {"hf_compress": hf_compress.__version__}
        | {name: version for name in packages if (version := _version(name)) is not None},
    }


def _unpacked(parameter: Tensor) -> Tensor:
    # Known by its state rather than its class, which only an optional package has.
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return parameter
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(parameter, state)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
