"""One module names kinds of devices; the others ask it."""

import ast
import re
from pathlib import Path

import pytest
import torch

from hf_compress.devices import (
    cpu_flags,
    device_name,
    hardware,
    host,
    is_host,
    own_device,
    peak_allocated,
    same_hardware,
    short_dtype,
    synchronize,
)

ROOT = Path(__file__).parents[1]
MODULES = [
    path
    for folder in (ROOT / "hf_compress", ROOT / "callbacks", ROOT / "scripts")
    for path in folder.rglob("*.py")
    if path != ROOT / "hf_compress" / "devices.py"
]
KINDS = ("cuda", "cpu", "mps", "xpu", "npu", "hpu")
PLACE = re.compile(rf"({'|'.join(KINDS)})(:\d+)?")


def named(tree):
    """Kinds of devices in code, with the line: not in what is read to users, and no key of a report."""
    keys = {id(node.slice) for node in ast.walk(tree) if isinstance(node, ast.Subscript)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if PLACE.fullmatch(node.value) and id(node) not in keys:
                yield node.lineno, node.value
        elif isinstance(node, ast.Attribute) and node.attr in (*KINDS, "accelerator"):
            if isinstance(node.value, ast.Name) and node.value.id == "torch":
                yield node.lineno, f"torch.{node.attr}"
        elif isinstance(node, ast.keyword) and node.arg in KINDS:
            yield node.value.lineno, f"{node.arg}="


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_other_module_names_a_device(path):
    assert list(named(ast.parse(path.read_text()))) == []


@pytest.mark.parametrize(
    "line",
    ['model.to("cuda")', "torch.cuda.is_available()", "PartialState(cpu=True)", 'x = "cuda:1"'],
)
def test_the_test_sees_them(line):
    assert list(named(ast.parse(line)))


def test_the_host():
    assert is_host(host())
    assert not is_host(torch.device("meta"))
    assert peak_allocated(host()) is None
    assert device_name(host()) == hardware()["cpu"]
    synchronize(host())


def test_the_dtype_of_the_host_is_short_where_it_multiplies_in_it():
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    native = any(word in flags.split() for word in ("avx512_bf16", "amx_bf16", "bf16"))
    assert short_dtype(host()) == (torch.bfloat16 if native else torch.float32)
    assert set(cpu_flags()) <= set(flags.split())


def test_own_device_is_an_accelerator_where_there_is_one():
    here = own_device()
    assert is_host(here) is not torch.accelerator.is_available()
    assert (hardware()["gpu"] is None) is is_host(here)
    torch.zeros(1, device=here)


def test_hardware_is_the_same_by_its_names():
    here = hardware()
    assert same_hardware(here, {**here, "threads": 99, "flags": []})
    assert not same_hardware(here, {**here, "gpu": "another"})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_says_what_it_is():
    here = own_device()
    torch.zeros(1 << 20, device=here)
    assert peak_allocated(here) >= 4 << 20
    assert device_name(here) == torch.cuda.get_device_name()
    assert short_dtype(here) in (torch.bfloat16, torch.float16)
    synchronize(here)
