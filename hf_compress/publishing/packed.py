"""Sparse at rest: one file with bitmasks and non-zero values, where that is smaller than dense.

    packed.safetensors    <name>.bitmask  uint8, one bit for each weight, the lowest bit first
                          <name>.values   what is not zero, in the order of the weights
                          <name>          as it was, where packing would not make it smaller
                          metadata        "packed": the shapes of the packed ones, as JSON

The file is ordinary safetensors under a name of its own, and the config says nothing of it: without
this package loading fails for want of weights, and never gives random ones. Dense is the default.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PreTrainedModel

PACKED = "packed.safetensors"
DENSE = ("model*.safetensors", "model.safetensors.index.json")

# Zero is where all bits are: a negative zero is a value, so that the round trip is exact.
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

_NOTE = """\
> **Packed weights.** `packed.safetensors` holds the non-zero weights and a bitmask, {percent:.0f} % of
> the dense size. Plain `from_pretrained` does not read it. Load it with
> `from hf_compress.publishing.packed import load_packed; load_packed(folder, {auto_class})`,
> then `save_pretrained` writes the dense files.
"""


@dataclass(frozen=True)
class Sizes:
    """Bytes of the weight files, as they lie on disk."""

    dense: int
    packed: int


def save_packed(source: str | Path, folder: str | Path) -> Sizes:
    """Writes a copy of the saved model `source` to `folder`, its weights packed.

    One tensor is in memory at a time; each is read twice. All other files are copied, and the README
    is told at its top how to load the model (one is made where there is none).

    Raises FileExistsError when `folder` is not empty, FileNotFoundError when `source` has no
    `model*.safetensors`, ValueError for a damaged file and for a quantized model, TypeError for a model
    where its folder is meant.
    """
    if isinstance(source, PreTrainedModel):
        raise TypeError(
            f"`source` is a {type(source).__name__}: save it with `save_pretrained`, and pass the "
            "folder."
        )
    source, folder = Path(source), Path(folder)
    files = sorted(source.glob(DENSE[0]))
    if not files:
        raise FileNotFoundError(
            f"{source} has no {DENSE[0]}: save the model there with `save_pretrained`."
        )
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty: choose another folder.")
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    if "quantization_config" in config:
        raise ValueError(f"{source} is quantized: its codes are not sparse. Pack the float model.")
    header, places = _layout(files)
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns(*DENSE), dirs_exist_ok=True)
    with (folder / PACKED).open("wb") as out:
        out.write(header)
        for _, name, _, tensor in _tensors(files):
            for key, piece in _pieces(name, tensor).items():
                out.seek(len(header) + places[key])
                out.write(piece.reshape(-1).view(torch.uint8).numpy().data)
    sizes = Sizes(sum(file.stat().st_size for file in files), (folder / PACKED).stat().st_size)
    _tell(folder / "README.md", config, sizes)
    return sizes


def load_packed(folder: str | Path, auto_class: Any) -> PreTrainedModel:
    """The model that `save_packed` wrote to `folder`, dense, as `auto_class.from_pretrained` gives it.

    auto_class: `AutoModelForCausalLM` and the like, or a model class.

    Raises FileNotFoundError without a packed file, ValueError for a damaged one.
    """
    config = AutoConfig.from_pretrained(folder)
    model_class = auto_class
    if not issubclass(auto_class, PreTrainedModel):
        # Auto classes take no state dict.
        with torch.device("meta"):
            model_class = type(auto_class.from_config(config))
    model = model_class.from_pretrained(None, config=config, state_dict=dict(read_packed(folder)))
    model.name_or_path = model.config.name_or_path = str(folder)
    if (Path(folder) / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def read_packed(folder: str | Path) -> Iterator[tuple[str, Tensor]]:
    """Names and dense tensors of the packed file in `folder`, one by one. Raises as `load_packed`."""
    path = Path(folder) / PACKED
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no {PACKED}: a dense model loads with `from_pretrained`."
        )
    try:
        with safe_open(path, framework="pt") as file:
            shapes = json.loads((file.metadata() or {}).get("packed", "null"))
            if not isinstance(shapes, dict):
                raise ValueError(
                    f"{path} was not written by `save_packed`: it has no list of packed tensors."
                )
            parts = {f"{name}.{part}" for name in shapes for part in ("bitmask", "values")}
            for name in file.keys():  # noqa: SIM118  # it is no dict
                if name not in parts:
                    yield name, file.get_tensor(name)
            for name, shape in shapes.items():
                bitmask, values = file.get_tensor(f"{name}.bitmask"), file.get_tensor(f"{name}.values")
                yield name, _unpacked(path, name, shape, bitmask, values)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): pack the model again.") from error


def _pieces(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """What is stored for `tensor`."""
    if tensor.itemsize not in _BITS:
        return {name: tensor}
    bits = tensor.reshape(-1).view(_BITS[tensor.itemsize])
    kept = bits != 0
    if (len(bits) + 7) // 8 + int(kept.sum()) * tensor.itemsize >= len(bits) * tensor.itemsize:
        return {name: tensor}
    bitmask = torch.from_numpy(np.packbits(kept.numpy(), bitorder="little"))
    return {f"{name}.bitmask": bitmask, f"{name}.values": bits[kept].view(tensor.dtype)}


def _unpacked(path: Path, name: str, shape: list[int], bitmask: Tensor, values: Tensor) -> Tensor:
    size = math.prod(shape)
    kept = torch.from_numpy(np.unpackbits(bitmask.numpy(), bitorder="little")).bool()
    if len(bitmask) != (size + 7) // 8 or kept[:size].sum() != len(values):
        raise ValueError(
            f"{path} is damaged: {name} of shape {shape} has {len(bitmask)} bytes of mask with "
            f"{int(kept.sum())} bits for {len(values)} values. Pack the model again."
        )
    bits = _BITS[values.itemsize]
    dense = torch.zeros(size, dtype=bits)
    dense[kept[:size]] = values.view(bits)
    return dense.view(values.dtype).reshape(shape)


def _tensors(files: list[Path]) -> Iterator[tuple[Path, str, str, Tensor]]:
    """File, name, dtype as safetensors calls it, and tensor, one at a time."""
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  # it is no dict
                    yield path, name, file.get_slice(name).get_dtype(), file.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}): save the model again.") from error


def _layout(files: list[Path]) -> tuple[bytes, dict[str, int]]:
    """The header of the packed file, and where each piece begins after it."""
    entries: dict[str, tuple[str, list[int], int]] = {}
    shapes = {}
    for path, name, dtype, tensor in _tensors(files):
        pieces = _pieces(name, tensor)
        if name not in pieces:
            shapes[name] = list(tensor.shape)
        for key, piece in pieces.items():
            if key in entries:
                raise ValueError(f"{path} holds {key!r}, which another file holds too.")
            # Kept as plain numbers: small tensors between the large ones would keep the heap from
            # shrinking, and it would grow to the size of the file.
            kind = "U8" if key == f"{name}.bitmask" else dtype
            entries[key] = kind, list(piece.shape), piece.itemsize
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "packed": json.dumps(shapes)}}
    places = {}
    end = 0
    # Wide numbers first: each must begin at a multiple of its size.
    for key, (kind, shape, width) in sorted(entries.items(), key=lambda entry: -entry[1][2]):
        places[key], end = end, end + math.prod(shape) * width
        header[key] = {"dtype": kind, "shape": shape, "data_offsets": [places[key], end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, places


def _tell(readme: Path, config: dict[str, Any], sizes: Sizes) -> None:
    """Puts the note at the top of the card, after its front matter."""
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    note = _NOTE.format(
        percent=100 * sizes.packed / sizes.dense,
        auto_class=next(iter(config.get("architectures") or ()), "AutoModel"),
    )
    front, mark, body = text.partition("\n---\n") if text.startswith("---\n") else ("", "", text)
    readme.write_text(f"{front}{mark}\n{note}\n{body}" if mark else f"{note}\n{body}", encoding="utf-8")
