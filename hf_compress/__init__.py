"""Compression for Hugging Face training: prune, distil and quantize inside the Trainer you have.

Public names are imported on first use, so that `import hf_compress` stays light and the pure-torch
parts work without the optional packages.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_compress.callbacks.pruning import PruningCallback
    from hf_compress.constraint import constrain
    from hf_compress.distillation.arguments import DistillationArguments
    from hf_compress.distillation.trainer import DistillationMixin, DistillationTrainer
    from hf_compress.publishing.publish import publish
    from hf_compress.quantization.bnb import quantized

__version__ = "0.1.0"

_HOMES = {
    "DistillationArguments": "hf_compress.distillation.arguments",
    "DistillationMixin": "hf_compress.distillation.trainer",
    "DistillationTrainer": "hf_compress.distillation.trainer",
    "PruningCallback": "hf_compress.callbacks.pruning",
    "constrain": "hf_compress.constraint",
    "publish": "hf_compress.publishing.publish",
    "quantized": "hf_compress.quantization.bnb",
}

__all__ = [
    "DistillationArguments",
    "DistillationMixin",
    "DistillationTrainer",
    "PruningCallback",
    "constrain",
    "publish",
    "quantized",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'hf_compress' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
