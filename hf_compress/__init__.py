"""Compression for Hugging Face training: prune, distil and quantize inside the Trainer you have.

Public names are imported on first use, so that `import hf_compress` stays light and the pure-torch
parts work without the optional packages.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_compress.callbacks.distillation import AnnealingCallback
    from hf_compress.callbacks.family import FamilyCallback
    from hf_compress.callbacks.pruning import PruningCallback
    from hf_compress.callbacks.quantization import QuantizationCallback
    from hf_compress.callbacks.report import ReportCallback
    from hf_compress.callbacks.rigl import RigLCallback
    from hf_compress.callbacks.structured import StructuredPruningCallback
    from hf_compress.constraint import constrain
    from hf_compress.distillation.arguments import DistillationArguments
    from hf_compress.distillation.cache.precompute import precompute_teacher
    from hf_compress.distillation.features.match import Match
    from hf_compress.distillation.fidelity import compare_teachers
    from hf_compress.distillation.layers import init_student
    from hf_compress.distillation.sequences import teacher_sequences
    from hf_compress.distillation.trainer import DistillationMixin, DistillationTrainer
    from hf_compress.latency import measure_latency
    from hf_compress.pruning.lora import merge_under_mask_
    from hf_compress.pruning.oneshot.prune import prune_oneshot_
    from hf_compress.pruning.sensitivity import scan_sensitivity
    from hf_compress.pruning.structure.budget import fit_structure
    from hf_compress.pruning.structure.removal import prune_structure, shrink
    from hf_compress.pruning.vocabulary.prune import prune_vocabulary
    from hf_compress.publishing.packed import load_packed, save_packed
    from hf_compress.publishing.publish import publish
    from hf_compress.publishing.push import push_folder
    from hf_compress.publishing.trainers import PublishingMixin
    from hf_compress.quantization.analysis import analyse
    from hf_compress.quantization.bnb import load_quantized, quantized
    from hf_compress.quantization.export import save_quantized
    from hf_compress.quantization.guard import guard_cpu_kernels_
    from hf_compress.quantization.merging import merge_and_requantize
    from hf_compress.quantization.oneshot import quantize_oneshot_
    from hf_compress.schedules import Drop
    from hf_compress.targets import find_targets

__version__ = "0.1.0"

_HOMES = {
    "AnnealingCallback": "hf_compress.callbacks.distillation",
    "DistillationArguments": "hf_compress.distillation.arguments",
    "DistillationMixin": "hf_compress.distillation.trainer",
    "DistillationTrainer": "hf_compress.distillation.trainer",
    "Drop": "hf_compress.schedules",
    "FamilyCallback": "hf_compress.callbacks.family",
    "Match": "hf_compress.distillation.features.match",
    "PruningCallback": "hf_compress.callbacks.pruning",
    "PublishingMixin": "hf_compress.publishing.trainers",
    "QuantizationCallback": "hf_compress.callbacks.quantization",
    "ReportCallback": "hf_compress.callbacks.report",
    "RigLCallback": "hf_compress.callbacks.rigl",
    "StructuredPruningCallback": "hf_compress.callbacks.structured",
    "analyse": "hf_compress.quantization.analysis",
    "compare_teachers": "hf_compress.distillation.fidelity",
    "constrain": "hf_compress.constraint",
    "find_targets": "hf_compress.targets",
    "fit_structure": "hf_compress.pruning.structure.budget",
    "guard_cpu_kernels_": "hf_compress.quantization.guard",
    "init_student": "hf_compress.distillation.layers",
    "load_packed": "hf_compress.publishing.packed",
    "load_quantized": "hf_compress.quantization.bnb",
    "measure_latency": "hf_compress.latency",
    "merge_and_requantize": "hf_compress.quantization.merging",
    "merge_under_mask_": "hf_compress.pruning.lora",
    "precompute_teacher": "hf_compress.distillation.cache.precompute",
    "prune_oneshot_": "hf_compress.pruning.oneshot.prune",
    "prune_structure": "hf_compress.pruning.structure.removal",
    "prune_vocabulary": "hf_compress.pruning.vocabulary.prune",
    "publish": "hf_compress.publishing.publish",
    "push_folder": "hf_compress.publishing.push",
    "quantize_oneshot_": "hf_compress.quantization.oneshot",
    "quantized": "hf_compress.quantization.bnb",
    "save_packed": "hf_compress.publishing.packed",
    "save_quantized": "hf_compress.quantization.export",
    "scan_sensitivity": "hf_compress.pruning.sensitivity",
    "shrink": "hf_compress.pruning.structure.removal",
    "teacher_sequences": "hf_compress.distillation.sequences",
}

__all__ = [
    "AnnealingCallback",
    "DistillationArguments",
    "DistillationMixin",
    "DistillationTrainer",
    "Drop",
    "FamilyCallback",
    "Match",
    "PruningCallback",
    "PublishingMixin",
    "QuantizationCallback",
    "ReportCallback",
    "RigLCallback",
    "StructuredPruningCallback",
    "analyse",
    "compare_teachers",
    "constrain",
    "find_targets",
    "fit_structure",
    "guard_cpu_kernels_",
    "init_student",
    "load_packed",
    "load_quantized",
    "measure_latency",
    "merge_and_requantize",
    "merge_under_mask_",
    "precompute_teacher",
    "prune_oneshot_",
    "prune_structure",
    "prune_vocabulary",
    "publish",
    "push_folder",
    "quantize_oneshot_",
    "quantized",
    "save_packed",
    "save_quantized",
    "scan_sensitivity",
    "shrink",
    "teacher_sequences",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'hf_compress' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
