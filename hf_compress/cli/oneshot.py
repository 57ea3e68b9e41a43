"""Prune a trained model in minutes, without training: `hf-compress oneshot`, `scripts/oneshot.py`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from safetensors import safe_open

from hf_compress.cli.arguments import CalibrationArguments
from hf_compress.cli.calibrated import Reads, check, finish, loaded
from hf_compress.cli.errors import refusing
from hf_compress.cli.recipe import parse
from hf_compress.pruning.oneshot.prune import OneShotReport, OneShotScore, parse_pattern, prune_oneshot_
from hf_compress.publishing.audit import Audit, audit
from hf_compress.publishing.naming import written_as
from hf_compress.targets import counted, find_targets


@dataclass(kw_only=True)
class OneShotArguments(CalibrationArguments):
    """See `hf_compress.prune_oneshot_`."""

    score: OneShotScore = field(
        default="sparsegpt",
        metadata={"help": "sparsegpt is the most accurate, wanda faster; magnitude reads no data."},
    )
    sparsity: float | None = field(
        default=None,
        metadata={"help": "Fraction of each weight to prune, in [0, 1); N:M says it itself."},
    )
    pattern: str = field(default="unstructured", metadata={"help": "unstructured, or N:M such as 2:4."})
    targets: list[str] | None = None
    ignore: list[str] | None = None


def main(argv: list[str]) -> None:
    with refusing():
        (arguments,) = parse(argv, OneShotArguments)
        n_of_m, sparsity = parse_pattern(arguments.pattern, arguments.sparsity)
        reads: Reads = "nothing" if arguments.score == "magnitude" else "texts"
        check(arguments, reads)
        folder = Path(arguments.output_dir)
        with loaded(arguments, reads) as (model, tokenizer, batches):
            targets = find_targets(model, arguments.targets, arguments.ignore).targets
            # Known before the work: what cannot be counted in the files is refused here.
            written = written_as(model, targets)
            report = prune_oneshot_(
                model,
                batches,
                score=arguments.score,
                sparsity=arguments.sparsity,
                pattern=arguments.pattern,
                targets=arguments.targets,
                ignore=arguments.ignore,
            )
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    found = audit(folder, targets=[tensor for names in written.values() for tensor in names])
    for names in written.values():
        found.check(names, sparsity)
    if n_of_m is not None:
        axes = {
            tensor: target.input_dim for name, target in targets.items() for tensor in written[name]
        }
        check_groups(folder, found, axes, n_of_m)
    details = {
        "pruned": {name: asdict(weight) for name, weight in report.weights.items()},
        "left_dense": dict(report.skipped),
    }
    finish("oneshot", arguments, found, batches=batches, details=details, table=_table(found, report))


def check_groups(folder: Path, found: Audit, axes: Mapping[str, int], n_of_m: tuple[int, int]) -> None:
    """Raises ValueError where a tensor of the files, of which `axes` tells the axis of input features,
    has more than n non-zeros among m neighbours."""
    n, m = n_of_m
    for file in found.files:
        with safe_open(folder / file, framework="pt") as tensors:
            for name in sorted(axes.keys() & set(tensors.keys())):
                groups = tensors.get_tensor(name).movedim(axes[name], -1).unflatten(-1, (-1, m))
                most = int(groups.count_nonzero(-1).max())
                if most > n:
                    raise ValueError(
                        f"{name} in {folder / file} is not {n}:{m}: {most} of {m} are left."
                    )


def _table(found: Audit, report: OneShotReport) -> dict[str, str]:
    worst = max(report.weights, key=lambda name: report.weights[name].error)
    errors = [weight.error for weight in report.weights.values()]
    return {
        "parameters": f"{found.parameters:,}, {found.sparsity:.2%} of them zero, stored all the same",
        "pruned": f"{len(report.weights)} weights, {found.target_sparsity:.4%} of them zero",
        "left dense": "; ".join(counted(report.skipped)),
        "energy lost": f"{sum(errors) / len(errors):.3%} of the outputs' on average over the weights, "
        f"{max(errors):.3%} in {worst}",
    }
