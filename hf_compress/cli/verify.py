"""Check the numbers of a published model: `hf-compress verify`, and `scripts/verify.py`.

Downloads the model where it is a repository, counts what is in its files, evaluates it again, and
prints each number that its card states beside what was found. Ends with status 1 where one is wrong.
A card without a `report.json` is checked as far as its `model-index` states numbers.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from transformers import AutoConfig, CompressedTensorsConfig, PreTrainedModel

from hf_compress.cli.errors import refusing
from hf_compress.cli.rows import Evaluation, batches, load_rows
from hf_compress.devices import own_device, same_hardware
from hf_compress.measure import bytes_in_memory, count_weights, environment
from hf_compress.publishing.adapters import open_adapters
from hf_compress.publishing.audit import ADAPTERS, audit
from hf_compress.publishing.card import in_words
from hf_compress.publishing.card_claims import index_claims, indexed_scores, score_claims
from hf_compress.publishing.claims import Claim, equal, file_claims, recovery_claims
from hf_compress.publishing.integers import reopen
from hf_compress.publishing.naming import hub_id
from hf_compress.publishing.recipe import bits_of
from hf_compress.publishing.remeasure import speed_claims
from hf_compress.publishing.scores import scores_of
from hf_compress.publishing.validate import find_problems
from hf_compress.quantization.guard import guard_cpu_kernels_
from hf_compress.samples import CORPORA

# Of scores. Elsewhere sums are rounded otherwise, and a row at the border of two classes may change.
_HERE, _ELSEWHERE = 1e-4, 2e-3
# Pickles run code when they are opened, and nothing here reads them.
_UNREAD = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt", "*.h5", "*.msgpack", "*.onnx", "*.gguf")


def main(argv: list[str]) -> None:
    options = _parser().parse_args(argv)
    with refusing():
        folder = _folder(options.model, options.revision)
        report = _report(folder)
        claims = list(_claims(options, folder, report))
    wrong = _print(claims)
    raise SystemExit(1 if wrong else 0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-compress verify",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="folder, or repository on the Hub")
    parser.add_argument("--revision", help="branch, tag or commit of the repository")
    parser.add_argument(
        "--data",
        help="what to evaluate on: hub id, csv/json/parquet file, folder of save_to_disk, or packaged "
        "corpus; by default what the report names, where it says how rows were made of it",
    )
    parser.add_argument("--split", help="of the data; these settings are by default the report's")
    parser.add_argument("--text_column")
    parser.add_argument("--label_column")
    parser.add_argument("--max_length", type=int, help="tokens of a row; longer ones are cut")
    parser.add_argument("--rows", type=int, help="evaluate on so many rows only, drawn at random")
    parser.add_argument("--batch_size", type=int)
    parser.add_argument(
        "--base", help="folder or repository of the base of adapters; by default what they name"
    )
    parser.add_argument(
        "--dense", help="folder or repository of the dense model, to check its scores too"
    )
    parser.add_argument("--latency", action="store_true", help="measure it again, on the same hardware")
    parser.add_argument("--memory", action="store_true", help="measure the peak memory again")
    parser.add_argument(
        "--tolerance",
        type=float,
        help=f"of scores; by default {_HERE} on the hardware, threads and versions of the report, and "
        f"{_ELSEWHERE} elsewhere",
    )
    return parser


def _folder(model: str, revision: str | None) -> Path:
    if Path(model).is_dir():
        return Path(model)
    if hub_id(model) is None:
        raise ValueError(f"{model!r} is neither a folder nor the `org/name` of a repository.")
    return Path(snapshot_download(model, revision=revision, ignore_patterns=list(_UNREAD)))


def _report(folder: Path) -> dict[str, Any] | None:
    """None for a card that is not one of ours."""
    path = folder / "report.json"
    if not path.is_file():
        return None
    report = json.loads(path.read_text(encoding="utf-8"))
    return report if "hf_compress" in report.get("environment", {}).get("versions", {}) else None


def _load_published(
    options: argparse.Namespace, folder: Path, report: Mapping[str, Any] | None
) -> tuple[Any, Any]:
    """The model as its users load it, and with floats in place of integers to look at them."""
    class_name = report["class_name"] if report else None
    if (folder / ADAPTERS).is_file() and report and report.get("adapters"):
        kind = _class(class_name or "")
        base = options.base or report["base_model"]["id"]
        model = open_adapters(folder, kind, base, report["adapters"]["quantization"])
        return model, model
    model = _load(folder, class_name)
    return model, _load(folder, class_name, floats=True) if _stands_for_floats(model) else model


def _class(name: str) -> Any:
    """Raises ValueError for a class that is not one of transformers: no code of a repository is run."""
    kind = getattr(transformers, name, None)
    if kind is None:
        raise ValueError(f"transformers has no {name!r}: only its own classes can be checked.")
    return kind


def _load(folder: Path, class_name: str | None, *, floats: bool = False) -> PreTrainedModel:
    """On a GPU where there is one; with `floats` in place of integers.

    Raises ValueError as `_class`.
    """
    config: Any = AutoConfig.from_pretrained(folder)
    names = [class_name] if class_name else config.architectures or [""]
    kind = _class(names[0])
    settings: Any = getattr(config, "quantization_config", None) or {}
    model = reopen(folder, kind, settings.get("quant_method", "") if floats else "")
    if bits_of(model):
        return guard_cpu_kernels_(model)
    device: Any = own_device()
    return model.to(device)


def _stands_for_floats(model: PreTrainedModel) -> bool:
    """Whether its layers are of compressed-tensors, which may round their inputs too."""
    settings: Any = getattr(model.config, "quantization_config", None)
    return isinstance(settings, CompressedTensorsConfig)


def _claims(
    options: argparse.Namespace,
    folder: Path,
    report: Mapping[str, Any] | None,
) -> Iterator[Claim]:
    model, opened = _load_published(options, folder, report)
    if report is None:
        indexed_scores(folder)  # there must be a card
        yield from _facts(folder, opened)
        found, why_not = _evaluate(options, folder, None, model)
        tolerance = _HERE if options.tolerance is None else options.tolerance
        yield from index_claims(folder, found, tolerance, why_not)
        return
    problems = find_problems(folder)
    yield Claim("card, beside report.json", "the same", f"{len(problems)} problems", not problems)
    yield from (Claim(f"card, {problem}", "", "", False) for problem in problems)
    yield from file_claims(report, folder, opened)
    tolerance = _tolerance(report) if options.tolerance is None else options.tolerance
    found, why_not = _evaluate(options, folder, report, model)
    yield from score_claims("compressed", report["compressed"]["metrics"], found, tolerance, why_not)
    if stated := report["compressed"].get("weight_bytes"):
        title = "weights in memory, bytes"
        # Those of compressed-tensors are floats from the first forward on.
        if _stands_for_floats(model) and not found:
            yield Claim(title, stated, "needs an evaluation", None)
        else:
            yield equal(title, stated, bytes_in_memory(model))
    if report["dense"]:
        found, why_not = {}, "needs --dense"
        if options.dense:
            place = _folder(options.dense, None)
            dense = _load(place, None)
            parameters = count_weights(dense).parameters
            yield equal("dense: parameters", report["dense"]["parameters"], parameters)
            found, why_not = _evaluate(options, place, report, dense)
        yield from score_claims("dense", report["dense"]["metrics"], found, tolerance, why_not)
    yield from recovery_claims(report)
    yield from speed_claims(report, folder, model, latency=options.latency, memory=options.memory)


def _facts(folder: Path, model: PreTrainedModel) -> Iterator[Claim]:
    """What the files of a card hold that states none of it in a form that can be read."""
    found = audit(folder)
    weights = count_weights(model)
    for name, value in (
        ("bytes on disk", found.file_bytes),
        ("parameters", weights.parameters),
        ("non-zero parameters", weights.nonzeros),
        ("sparsity of all weights", 1 - weights.nonzeros / weights.parameters),
    ):
        yield Claim(name, "not stated", value, None)


def _evaluate(
    options: argparse.Namespace,
    folder: Path,
    report: Mapping[str, Any] | None,
    model: PreTrainedModel,
) -> tuple[dict[str, float], str]:
    """The scores, and why there are none."""
    # Rows made in another way would give other scores, and prove nothing.
    named = report["dataset"]["name"] if report and report.get("evaluation") else None
    data = options.data or (named if named in CORPORA or hub_id(named) else None)
    if data is None:
        return {}, "needs --data"
    how = _settings(options, report)
    bf16 = bool(report and report["recipe"]["training"] and report["recipe"]["training"]["bf16"])

    def context() -> AbstractContextManager[Any]:
        # As it was evaluated.
        return torch.autocast(model.device.type, torch.bfloat16) if bf16 else nullcontext()

    try:
        rows = load_rows(model, folder, data, how)
        print(f"evaluating {folder} on {len(rows):,} rows of {data}: {in_words(asdict(how))}")
        return scores_of(model, batches(rows, folder, how.batch_size), context=context), ""
    except (ValueError, OSError) as error:
        if options.data is not None:
            raise
        return {}, f"{data}: {' '.join(str(error).split())[:200]}"


def _settings(options: argparse.Namespace, report: Mapping[str, Any] | None) -> Evaluation:
    how = Evaluation(**(report.get("evaluation") or {}) if report else {})
    given: dict[str, Any] = {
        field.name: vars(options)[field.name]
        for field in fields(Evaluation)
        if vars(options).get(field.name) is not None
    }
    if "split" in given:
        given["tenth_of"] = None
    return replace(how, **given)


def _tolerance(report: Mapping[str, Any]) -> float:
    here, there = environment(), report["environment"]
    versions = [{k: e["versions"].get(k) for k in ("torch", "transformers")} for e in (here, there)]
    alike = versions[0] == versions[1] and same_hardware(here, there)
    # Products in bfloat16 are summed otherwise by another number of threads.
    return _HERE if alike and here["threads"] == there["threads"] else _ELSEWHERE


def _print(claims: list[Claim]) -> int:
    """Prints them as a table and returns how many are wrong."""
    verdicts = {True: "yes", False: "NO", None: "-"}
    rows = [("claim", "claimed", "found", "ok")]
    rows += [(c.name, _cell(c.claimed), _cell(c.found), verdicts[c.ok]) for c in claims]
    widths = [max(len(row[column]) for row in rows if len(row[column]) < 60) for column in range(4)]
    print()
    for name, *cells in rows:
        padded = [f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True)]
        print("  ".join([f"{name:{widths[0]}}", *padded]).rstrip())
    wrong = sum(claim.ok is False for claim in claims)
    right, rest = sum(claim.ok is True for claim in claims), sum(claim.ok is None for claim in claims)
    print(f"\n{right} claims hold, {wrong} do not, {rest} were not checked")
    return wrong


def _cell(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "none" if value is None or value == {} else str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"
