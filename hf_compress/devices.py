"""What computes, and in which precision: the one place of the package that names kinds of devices."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

# Of the instructions of a CPU, those that decide how fast integers and short floats are.
_DECISIVE = re.compile(r"avx2|avx512f|.*vnni.*|.*bf16.*|amx.*|asimd.*|i8mm|sve.*")


def host() -> torch.device:
    """The CPU, where inputs and results of every runtime are."""
    return torch.device("cpu")


def own_device() -> torch.device:
    """That of this process: its CUDA, XPU or MPS device, or another that torch knows, else the CPU.

    Of several processes on one machine each has its own, which becomes the current one.
    """
    return PartialState().device if torch.accelerator.is_available() else host()


def processes() -> PartialState:
    """Those that were launched together, and the device of this one."""
    # Processes without accelerators find each other only where this is said.
    return PartialState(cpu=not torch.accelerator.is_available())


def is_host(device: torch.device) -> bool:
    return device.type == "cpu"


def short_dtype(device: torch.device) -> torch.dtype:
    """The shortest float in which `device` multiplies without emulating it: bf16 where it can; else
    fp16, on a GPU; else fp32."""
    kind = device.type
    if kind == "cpu":
        return torch.bfloat16 if any("bf16" in flag for flag in cpu_flags()) else torch.float32
    if kind == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif kind == "xpu":
        native = torch.xpu.is_bf16_supported()
    elif kind == "mps":
        native = torch.backends.mps.is_macos_or_newer(14, 0)
    else:
        native = True  # the accelerators that torch knows beside these were made for it
    return torch.bfloat16 if native else torch.float16


def has_sparse_kernels(device: torch.device) -> bool:
    """Whether torch multiplies 2:4 weights on `device`: on CUDA GPUs of capability 8.0 and higher."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def synchronize(device: torch.device) -> None:
    """Waits until `device` has done what it was given."""
    if not is_host(device):
        torch.accelerator.synchronize(device)


def peak_allocated(device: torch.device) -> int | None:
    """The most bytes that torch has had on `device` at one time; None where it does not count them: on
    a CPU, and on MPS."""
    if device.type in ("cpu", "mps"):
        return None
    return int(torch.get_device_module(device).max_memory_allocated())


def device_name(device: torch.device) -> str:
    """As its maker calls it."""
    if is_host(device):
        return _cpu_name()
    if device.type == "mps":
        return f"{_cpu_name()} GPU"
    return str(torch.get_device_module(device).get_device_name(device))


def cpu_flags() -> list[str]:
    """The instructions for vectors, integers and bf16 that this CPU has, as Linux names them; none
    where it is not told."""
    flags = _cpu_lines("flags") or _cpu_lines("Features")
    return sorted(flag for flag in flags[0].split() if _DECISIVE.fullmatch(flag)) if flags else []


def hardware() -> dict[str, Any]:
    """What measurements of speed hold for, as `report.json` keeps it."""
    device = own_device()
    return {
        "cpu": _cpu_name(),
        "flags": cpu_flags(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": None if is_host(device) else device_name(device),
    }


def same_hardware(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two of `hardware` name the same CPU and GPU."""
    return one["cpu"] == other["cpu"] and one["gpu"] == other["gpu"]


def _cpu_name() -> str:
    names = _cpu_lines("model name")
    return names[0] if names else platform.processor() or platform.machine()


def _cpu_lines(key: str) -> list[str]:
    """What Linux tells of each core under `key`."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    pairs = (line.partition(":") for line in lines)
    return [value.strip() for name, _, value in pairs if name.strip() == key]
