"""The model card, written from `report.json` alone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from importlib.resources import files
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, StrictUndefined

from hf_compress.publishing.card_tables import (
    efficiency_table,
    exports_table,
    integers_table,
    number,
    pruned_table,
    results_table,
    settings_of,
    skipped_reasons,
)

# Below so many times the accuracy of guessing a model has not learnt the task.
_NEAR_CHANCE = 1.2
_MUCH_BETTER = 105.0  # percent of recovery: no noise of an evaluation


def render(report: Mapping[str, Any], *, pictures: Iterable[str] = ()) -> str:
    """The whole README.md. report: what `publish` writes to `report.json`. pictures: file names."""
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters.update(paper=paper_link, cell=_cell, python=_literal, told=in_words)
    template = files("hf_compress.publishing") / "templates" / "model_card.md"
    report = _complete(report)
    body = environment.from_string(template.read_text(encoding="utf-8")).render(
        report=report,
        headline=_headline(report),
        results=results_table(report),
        efficiency=efficiency_table(report),
        stored=_stored(report),
        integers=integers_table(report),
        exports=exports_table(report),
        pruned=pruned_table(report),
        pruning=[m for m in report["recipe"]["methods"] if m.get("method") == "pruning"],
        settings=[settings_of(method) for method in report["recipe"]["methods"]],
        skipped=skipped_reasons(report["recipe"]["methods"]),
        papers=_papers(report),
        evaluation=in_words(report["evaluation"]),
        ramped=any("sparsity" in row for row in report["history"]),
        pictures=list(pictures),
    )
    return f"---\n{front_matter(report).to_yaml()}\n---\n\n{body}"


def front_matter(report: Mapping[str, Any]) -> ModelCardData:
    """What the Hub reads. The scores are those of the compressed model only."""
    report = _complete(report)
    dataset, base = report["dataset"], report["base_model"]
    metrics = _own_metrics(report)
    results = None
    if dataset["name"] and report["pipeline_tag"] and metrics:
        results = [
            EvalResult(
                task_type=report["pipeline_tag"],
                dataset_type=dataset["name"],
                dataset_name=dataset["name"],
                dataset_split=dataset["split"],
                dataset_revision=dataset["revision"],
                metric_type=name,
                metric_value=value,
            )
            for name, value in metrics.items()
        ]
    extra = {"base_model_relation": report["relation"]} if base["id"] else {}
    if report["license"]["link"]:
        extra["license_link"] = report["license"]["link"]
    return ModelCardData(
        model_name=report["name"] if results else None,
        base_model=base["id"],
        language=report["language"],
        library_name="peft" if report["adapters"] else "transformers",
        pipeline_tag=report["pipeline_tag"],
        license=report["license"]["id"],
        license_name=report["license"]["name"],
        tags=_tags(report),
        datasets=[dataset["name"]] if dataset["name"] else None,
        metrics=list(metrics) or None,
        eval_results=results,
        **extra,
    )


def caution(report: Mapping[str, Any]) -> str | None:
    """A sentence where the recovery of the report's metric says more about the dense model than about
    the compression; else None."""
    metric, recovery = report["metric"], report["recovery"]
    if metric not in recovery:
        return None
    dense, chance = report["dense"]["metrics"][metric], report["chance"]
    if metric == "accuracy" and chance is not None and dense < _NEAR_CHANCE * chance:
        return (
            f"The dense model is hardly better than guessing ({number(chance)}): it was not "
            "fine-tuned for this task, and a recovery against it says nothing about the compression."
        )
    if recovery[metric] > _MUCH_BETTER:
        return (
            "The dense model is much the worse of the two here, as one is that was not fine-tuned for "
            "this task: a recovery above 100 % says that, and not that compression improved it."
        )
    return None


def in_words(settings: Mapping[str, Any] | None) -> str:
    """Settings by name, without those that are None."""
    given = {name: value for name, value in (settings or {}).items() if value is not None}
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in given.items())


def paper_link(paper: str) -> str:
    """A link for the arXiv number in `paper`; other text as it is."""
    found = re.search(r"\d{4}\.\d{4,5}", paper)
    return f"https://huggingface.co/papers/{found[0]}" if found else paper


def _complete(report: Mapping[str, Any]) -> dict[str, Any]:
    """With what reports of earlier versions do not tell."""
    told = {
        **{"structure": {}, "language": None, "evaluation": None},
        **{"adapters": None, "image_processor": False, "exports": {}, "choice": None},
        "feature_extractor": False,
        **report,
    }
    for part, later in (("dataset", "revision"), ("license", "link"), ("base_model", "revision")):
        told[part] = {later: None, **told[part]}
    return told


def _own_metrics(report: Mapping[str, Any]) -> dict[str, float]:
    """Scores of the task: no losses, and nothing that is relative to another model."""
    metrics = report["compressed"]["metrics"].items()
    return {k: v for k, v in metrics if "loss" not in k and k != "agreement"}


def _headline(report: Mapping[str, Any]) -> str:
    metric, dataset = report["metric"], report["dataset"]
    if metric is None:
        return "Its quality was not measured."
    count = f" ({dataset['rows']:,} rows)" if dataset["rows"] is not None else ""
    where = f" on {dataset['name']}{count}" if dataset["name"] else ""
    score = f"It reaches {number(report['compressed']['metrics'][metric])} {metric}{where}"
    if metric not in report["recovery"]:
        return f"{score}; the dense model was not measured."
    score += f"; the dense model, {number(report['dense']['metrics'][metric])}"
    if sentence := caution(report):
        return f"{score}. {sentence}"
    return f"{score} (recovery {report['recovery'][metric]:.2f} %)."


def _stored(report: Mapping[str, Any]) -> str:
    dtypes = Counter(tensor["dtype"] for tensor in report["audit"]["tensors"].values())
    return ", ".join(dtype for dtype, _ in dtypes.most_common())


def _papers(report: Mapping[str, Any]) -> dict[str, list[str]]:
    """What each paper was used for, by the paper."""
    recipe = report["recipe"]
    papers: dict[str, list[str]] = {}
    for method in recipe["methods"]:
        if method.get("paper"):
            name = f"{method['method']}, {method['score']}" if "score" in method else method["method"]
            papers.setdefault(method["paper"], []).append(name)
    if recipe["distillation"]:
        papers.setdefault(recipe["distillation"]["paper"], []).append("distillation")
    adapters, bits = report["adapters"], report["quantized"]
    if adapters and adapters["peft_type"] == "LORA":
        papers.setdefault("arXiv:2106.09685", []).append("adapters")
    if bits:
        paper = "arXiv:2305.14314" if bits == 4 else "arXiv:2208.07339"
        papers.setdefault(paper, []).append(f"{bits} bit")
    return papers


def _tags(report: Mapping[str, Any]) -> list[str]:
    tags = ["hf-compress"]
    if report["audit"]["target_sparsity"]:
        tags += ["pruned", "sparse"]
    if report["recipe"]["distillation"]:
        tags.append("knowledge-distillation")
    if report["adapters"]:
        tags += ["adapter", report["adapters"]["peft_type"].lower()]
    if report["quantized"]:
        tags += ["quantized", "bitsandbytes", f"{report['quantized']}-bit"]
    if integers := report["integers"]:
        tags += ["quantized", f"{integers['bits']}-bit"]
        tags += [integers["format"]] if integers["format"] != "dense" else []
    return tags


def _literal(value: Any) -> str:
    return repr(value).replace("'", '"')


def _cell(text: str) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")
