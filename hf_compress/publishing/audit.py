"""What the written files hold: every number about a saved model comes from here."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

MODEL = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTERS = "adapter_model.safetensors"
_AT_ONCE = 16 * 2**20  # bytes


@dataclass(frozen=True)
class TensorAudit:
    """One tensor as it is stored."""

    shape: tuple[int, ...]
    dtype: str
    numel: int
    zeros: int
    bytes: int

    @property
    def sparsity(self) -> float:
        return self.zeros / self.numel if self.numel else 0.0

    def joined(self, other: TensorAudit) -> TensorAudit:
        """The counts of two pieces of one tensor together."""
        return replace(
            self,
            numel=self.numel + other.numel,
            zeros=self.zeros + other.zeros,
            bytes=self.bytes + other.bytes,
        )


@dataclass(frozen=True)
class Audit:
    """A saved model.

    tensors: by name, in the order of the files. tied: a second copy of a tied tensor, and the one it
    repeats; it is counted once. targets: the tensors that were to be compressed. file_bytes: of the
    files, with their headers.
    """

    tensors: dict[str, TensorAudit]
    files: tuple[str, ...]
    file_bytes: int
    tied: dict[str, str] = field(default_factory=dict)
    targets: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        return sum(tensor.numel for tensor in self._counted())

    @property
    def zeros(self) -> int:
        return sum(tensor.zeros for tensor in self._counted())

    @property
    def nonzeros(self) -> int:
        return self.parameters - self.zeros

    @property
    def sparsity(self) -> float:
        """Fraction of zeros among all weights."""
        return self.zeros / self.parameters

    @property
    def target_sparsity(self) -> float | None:
        """Fraction of zeros among `targets`; None without targets."""
        return self.sparsity_of(self.targets) if self.targets else None

    def sparsity_of(self, names: Iterable[str]) -> float:
        """Fraction of zeros among the tensors `names` together. Raises KeyError for an unknown one."""
        zeros, total = self._sum(names)
        return zeros / total

    def check(self, names: Iterable[str], sparsity: float) -> None:
        """Raises ValueError when `names` together hold fewer than round(sparsity * size) zeros."""
        names = list(names)
        zeros, total = self._sum(names)
        if zeros < round(sparsity * total):
            densest = min(names, key=lambda name: self.tensors[name].sparsity)
            raise ValueError(
                f"The files are denser than asked: {zeros:,} of {total:,} weights are zero "
                f"({zeros / total:.6f}), not {round(sparsity * total):,} ({sparsity:.6f}). The densest "
                f"is {densest} ({self.tensors[densest].sparsity:.6f}). Was the schedule finished, and "
                "nothing trained after it?"
            )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {
            "parameters": self.parameters,
            "nonzeros": self.nonzeros,
            "sparsity": self.sparsity,
            "target_sparsity": self.target_sparsity,
        }

    def _counted(self) -> Iterator[TensorAudit]:
        return (tensor for name, tensor in self.tensors.items() if name not in self.tied)

    def _sum(self, names: Iterable[str]) -> tuple[int, int]:
        chosen = [self.tensors[name] for name in names]
        if not chosen:
            raise ValueError("No tensors were named.")
        return sum(tensor.zeros for tensor in chosen), sum(tensor.numel for tensor in chosen)


def audit(folder: str | Path, *, targets: Iterable[str] = ()) -> Audit:
    """Opens the safetensors files that `save_pretrained` wrote to `folder` and counts what is there.

    Some 16 MB of a file are in memory at a time, mapped ones too. targets: names of the tensors that
    were to be compressed.

    Raises FileNotFoundError for a missing file, ValueError for a damaged one, for an index that does
    not match the files, and for `targets` that they do not hold.
    """
    folder = Path(folder)
    files, index = _files(folder)
    vocabulary = _tied_vocabulary(folder)
    tensors: dict[str, TensorAudit] = {}
    owners: dict[str, str] = {}
    sums: dict[str, Any] = {}
    for file in files:
        for name, shape, piece in _pieces(folder / file):
            if index.get(name, file) != file or owners.setdefault(name, file) != file:
                raise ValueError(f"{folder / file} holds {name!r}, which belongs to another file.")
            found = replace(count_tensor(piece), shape=shape)
            tensors[name] = tensors[name].joined(found) if name in tensors else found
            if vocabulary is not None and len(shape) == 2 and shape[0] == vocabulary:
                sums.setdefault(name, hashlib.sha256()).update(_bytes(piece))
    tied: dict[str, str] = {}
    firsts: dict[bytes, str] = {}
    for name, digest in sums.items():
        first = firsts.setdefault(digest.digest(), name)
        if first != name:
            tied[name] = first
    if missing := [name for name in index if name not in tensors]:
        raise ValueError(f"{folder} lacks {len(missing)} tensors of its index: {missing[:3]}.")
    targets = tuple(targets)
    if unknown := [name for name in targets if name not in tensors]:
        raise ValueError(f"{folder} lacks {len(unknown)} targets, {unknown[:3]} among them.")
    total = sum((folder / file).stat().st_size for file in files)
    return Audit(tensors, tuple(files), total, tied, targets)


def _files(folder: Path) -> tuple[list[str], dict[str, str]]:
    """The weight files of `folder`, and which tensor the index says is where."""
    path = folder / INDEX
    for single in (MODEL, *((ADAPTERS,) if not path.is_file() else ())):
        if (folder / single).is_file():
            return [single], {}
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has neither {MODEL} nor {INDEX}, and no {ADAPTERS}.")
    try:
        index = json.loads(path.read_text())["weight_map"]
        files = sorted(set(index.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error!r}.") from error
    for file in files:
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder} lacks {file}, which its index names.")
    return files, index


def _pieces(path: Path) -> Iterator[tuple[str, tuple[int, ...], Tensor]]:
    """Name, shape, and all values of each tensor of a file, those of a large one in several pieces.

    Some 16 MB at a time come from one mapping of the file: its pages stay in memory until it is closed.
    """
    try:
        with safe_open(path, framework="pt") as file:
            parts = [part for name in file.keys() for part in _parts(name, file.get_slice(name))]  # noqa: SIM118
        while parts:
            sizes = itertools.accumulate(size for *_, size in parts)
            count = max(1, sum(size <= _AT_ONCE for size in itertools.islice(sizes, len(parts))))
            with safe_open(path, framework="pt") as file:
                for name, shape, rows, _ in parts[:count]:
                    stored = file.get_slice(name)[rows] if shape else file.get_tensor(name)
                    yield name, shape, stored
            parts = parts[count:]
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): save the model again.") from error


def _parts(name: str, stored: Any) -> Iterator[tuple[str, tuple[int, ...], slice, int]]:
    """Name, shape, rows and bytes of pieces that are small enough where a tensor has small rows."""
    shape = tuple(stored.get_shape())
    bits = re.search(r"\d+", stored.get_dtype())  # BOOL has none
    row = math.prod(shape[1:]) * (int(bits[0]) if bits else 8) // 8
    step = max(1, _AT_ONCE // max(1, row))
    for start in range(0, shape[0] if shape else 1, step):
        rows = min(step, (shape[0] if shape else 1) - start)
        yield name, shape, slice(start, start + rows), rows * row
    if shape and not shape[0]:
        yield name, shape, slice(0, 0), 0


def count_tensor(tensor: Tensor) -> TensorAudit:
    # The 8-bit floats have no kernel to compare with zero.
    small = tensor.is_floating_point() and tensor.itemsize == 1
    nonzeros = int(torch.count_nonzero(tensor.float() if small else tensor))
    return TensorAudit(
        shape=tuple(tensor.shape),
        dtype=str(tensor.dtype).removeprefix("torch."),
        numel=tensor.numel(),
        zeros=tensor.numel() - nonzeros,
        bytes=tensor.numel() * tensor.itemsize,
    )


def _tied_vocabulary(folder: Path) -> int | None:
    """Rows of the embedding, where the config says that the output is tied to it."""
    path = folder / "config.json"
    if not path.is_file():
        return None
    config = json.loads(path.read_text())
    text = {**config, **config.get("text_config", {})}
    return text.get("vocab_size") if text.get("tie_word_embeddings") else None


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().view(torch.uint8).numpy().data
