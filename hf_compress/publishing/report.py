"""What `report.json` holds: what the user told, the model, how it was made, what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.modelcard import TASK_MAPPING

from hf_compress.measure import CompressionReport
from hf_compress.publishing.adapters import is_adapted
from hf_compress.publishing.audit import Audit
from hf_compress.publishing.differences import structure_of
from hf_compress.publishing.evaluation import rows
from hf_compress.publishing.naming import cached_revision, hub_id
from hf_compress.publishing.recipe import Recipe, bits_of, precision_of, teacher_of
from hf_compress.targets import without_adapters


@dataclass(frozen=True)
class Labels:
    """What only the user can tell."""

    name: str
    base_model: str | None
    baseline_name: str | None
    dataset: str | None
    split: str | None
    metric: str | None
    license: str | None
    license_name: str | None
    license_link: str | None
    language: Sequence[str] | None
    dataset_revision: str | None
    evaluation: Mapping[str, Any] | None


def report_of(
    labels: Labels,
    trainer: Any,
    model: PreTrainedModel,
    baseline: PreTrainedModel | None,
    recipe: Recipe,
    found: Audit,
    format: str,
) -> dict[str, Any]:
    """All of a report but what is measured."""
    own = without_adapters(model)
    class_name = type(own).__name__
    base = labels.base_model or own.config.name_or_path or None
    return {
        "name": labels.name,
        "class_name": class_name,
        "pipeline_tag": _pipeline_tag(class_name),
        "base_model": {
            "id": hub_id(base),
            "name": hub_id(base) or (base and Path(base).name),
            "revision": cached_revision(hub_id(base)),
        },
        "relation": _relation(model, format),
        "quantized": bits_of(model),
        "license": {"id": labels.license, "name": labels.license_name, "link": labels.license_link},
        "language": labels.language,
        "dataset": {
            "name": labels.dataset,
            "revision": labels.dataset_revision,
            "split": labels.split,
            "rows": rows(trainer),
        },
        "evaluation": labels.evaluation and dict(labels.evaluation),
        "structure": structure_of(own, baseline),
        "chance": _chance(own),
        "dense_name": baseline and (labels.baseline_name or _describe(baseline, trainer)),
        "audit": found.to_dict(),
        "recipe": asdict(recipe),
    }


def results_of(measured: CompressionReport, metric: str | None) -> dict[str, Any]:
    """The measured part of a report. metric: the headline; by default the first that is no loss."""
    scores = measured.compressed.metrics
    recovery = {name: measured.recovery(name) for name in scores}
    return measured.to_dict() | {
        "metric": metric or next((name for name in scores if "loss" not in name), None),
        "recovery": {name: value for name, value in recovery.items() if value is not None},
    }


def _relation(model: Any, format: str) -> str:
    if is_adapted(model):
        return "adapter"
    return "finetune" if bits_of(model) is None and format == "dense" else "quantized"


def _describe(baseline: PreTrainedModel, trainer: Any) -> str:
    role = "the teacher" if baseline is teacher_of(trainer) else "the model before"
    name = hub_id(baseline.config.name_or_path) or type(baseline).__name__
    return f"{role}, {name} in {precision_of(baseline)}"


def _chance(model: PreTrainedModel) -> float | None:
    """Accuracy of guessing among the classes; None for other tasks than one class for each row."""
    tag, config = _pipeline_tag(type(model).__name__) or "", model.config
    if not tag.endswith("classification") or tag == "token-classification":
        return None
    if config.problem_type not in (None, "single_label_classification"):
        return None
    classes = config.num_labels or 1
    return 1 / classes if classes > 1 else None


def _pipeline_tag(class_name: str) -> str | None:
    tasks: Any = TASK_MAPPING
    for task, mapping in tasks.items():
        for names in mapping.values():
            if class_name in ([names] if isinstance(names, str) else names):
                return task
    return None
