"""Remove parts of a trained model for good: `hf-compress structure`, `scripts/structure.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from hf_compress.calibration.batches import Batch
from hf_compress.cli.arguments import CalibrationArguments
from hf_compress.cli.calibrated import Reads, check, finish, loaded
from hf_compress.cli.errors import refusing
from hf_compress.cli.recipe import parse
from hf_compress.pruning.structure.budget import fit_structure
from hf_compress.pruning.structure.choice import check_fraction
from hf_compress.pruning.structure.removal import prune_structure
from hf_compress.pruning.structure.scores import UnitScore
from hf_compress.publishing.audit import audit

READS: dict[UnitScore, Reads] = {
    "taylor": "labels",
    "activation": "texts",
    "magnitude": "nothing",
    "random": "nothing",
}


@dataclass(kw_only=True)
class StructureArguments(CalibrationArguments):
    """See `hf_compress.prune_structure`, and for a budget `hf_compress.fit_structure`."""

    ffn: float = field(default=0.0, metadata={"help": "Fraction of feed-forward neurons that goes."})
    heads: float = field(default=0.0, metadata={"help": "Fraction of the attention heads that goes."})
    experts: float = field(default=0.0, metadata={"help": "Fraction of the experts that goes."})
    hidden: float = field(
        default=0.0, metadata={"help": "Fraction of the features of the residual stream that goes."}
    )
    layers: int | None = field(default=None, metadata={"help": "How many layers stay; by default all."})
    speedup: float | None = field(
        default=None,
        metadata={"help": "Instead: how many times faster here, above 1, on a batch of rows."},
    )
    max_bytes: int | None = field(
        default=None, metadata={"help": "Instead: the most the weights take."}
    )
    score: UnitScore = field(
        default="taylor", metadata={"help": "What decides; magnitude and random read no data."}
    )
    round_to: int = field(
        default=1,
        metadata={"help": "Neurons and hidden features stay in multiples of it, such as 8 or 64."},
    )
    seed: int = 0


def main(argv: list[str]) -> None:
    with refusing():
        (arguments,) = parse(argv, StructureArguments)
        fractions = {kind: vars(arguments)[kind] for kind in ("ffn", "heads", "experts", "hidden")}
        for kind, fraction in fractions.items():
            check_fraction(kind, fraction)
        named = arguments.layers is not None or any(fractions.values())
        budget = arguments.speedup is not None or arguments.max_bytes is not None
        if named and budget:
            raise ValueError(
                "a budget says what goes: leave out `ffn`, `heads`, `experts`, `hidden` and `layers`."
            )
        if not (named or budget):
            raise ValueError(
                "nothing to remove: pass `ffn`, `heads`, `experts`, `hidden` or `layers`, or a budget: "
                "`speedup` or `max_bytes`."
            )
        reads: Reads = "labels" if budget else READS[arguments.score]
        check(arguments, reads)
        with loaded(arguments, reads) as (model, tokenizer, batches):
            remove = _fitted if budget else _named
            smaller, details = remove(model, batches or [], arguments)
            before, expected = model.num_parameters(), smaller.num_parameters()
            smaller.save_pretrained(arguments.output_dir)
            tokenizer.save_pretrained(arguments.output_dir)
    found = audit(arguments.output_dir)
    if found.parameters != expected:
        raise ValueError(f"the files hold {found.parameters:,} parameters, not {expected:,}.")
    share = f"{found.parameters:,} of {before:,} ({found.parameters / before:.2%})"
    finish(
        "structure",
        arguments,
        found,
        batches=batches,
        details={"parameters_before": before} | details,
        table={"parameters": share},
    )


def _named(
    model: PreTrainedModel, batches: Sequence[Batch], arguments: StructureArguments
) -> tuple[PreTrainedModel, dict[str, Any]]:
    smaller = prune_structure(
        model,
        ffn=arguments.ffn,
        heads=arguments.heads,
        experts=arguments.experts,
        hidden=arguments.hidden,
        layers=arguments.layers,
        score=arguments.score,
        calibration=batches,
        round_to=arguments.round_to,
        seed=arguments.seed,
    )
    return smaller, {}


def _fitted(
    model: PreTrainedModel, batches: Sequence[Batch], arguments: StructureArguments
) -> tuple[PreTrainedModel, dict[str, Any]]:
    fitted = fit_structure(
        model,
        batches,
        speedup=arguments.speedup,
        max_bytes=arguments.max_bytes,
        score=arguments.score,
        round_to=arguments.round_to,
        seed=arguments.seed,
    )
    found = {"removed": fitted.settings, "speedup": fitted.speedup, "losses": fitted.losses}
    return fitted.model, found
