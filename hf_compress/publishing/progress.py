"""The card of a model that is still being trained: how far it is, and nothing that was not measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from numbers import Real
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from jinja2 import Environment, StrictUndefined

from hf_compress.publishing.naming import hub_id

# Of the clock, not of the model.
_NOT_TOLD = ("epoch", "step", "runtime", "per_second", "total_flos")


def write_progress_card(model: Any, args: Any, state: Any) -> Path:
    """Writes README.md to the output directory of a training, in place of any that is there.

    args, state: the arguments and the state of its Trainer.

    Trainer pushes that folder while it trains, with `hub_strategy` "every_save", "checkpoint" and
    "all_checkpoints", and a card of another model or of an earlier step would go with the weights.
    """
    path = Path(args.output_dir) / "README.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    name = args.hub_model_id or path.parent.absolute().name
    try:
        base = hub_id(model.config.name_or_path or None)
    except AttributeError:  # a module of the user's own
        base = None
    front = ModelCardData(library_name="transformers", tags=["hf-compress"], base_model=base)
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    template = files("hf_compress.publishing") / "templates" / "progress_card.md"
    body = environment.from_string(template.read_text(encoding="utf-8")).render(
        name=name,
        kind=type(model).__name__,
        step=state.global_step,
        steps=state.max_steps,
        rows=_last(state.log_history),
    )
    path.write_text(f"---\n{front.to_yaml()}\n---\n\n{body}", encoding="utf-8")
    return path


def _last(history: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """The last number that was logged of each quantity, with its step, in the order of the names."""
    found: dict[str, tuple[str, str, str]] = {}
    for row in history:
        for name, value in row.items():
            if isinstance(value, Real) and not any(word in name for word in _NOT_TOLD):
                found[name] = (name, str(row["step"]), f"{value:.6g}")
    return [found[name] for name in sorted(found)]
