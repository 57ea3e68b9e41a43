"""Which weights a method works on, and for each one left out, why."""

from __future__ import annotations

import difflib
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class Target:
    """A weight to compress. `input_dim` is its axis of input features: 1 in a Linear (out, in),
    0 in a Conv1D (in, out), -1 in stacked experts (experts, out, in), -2 where they are (experts, in,
    out), as in GPT-OSS and Llama 4."""

    name: str
    param: nn.Parameter
    input_dim: int

    @property
    def owner(self) -> str:
        """The name of the module that it belongs to."""
        return self.name.rpartition(".")[0]

    @property
    def stacked(self) -> bool:
        """Whether it is the stacked matrices of experts."""
        return self.input_dim < 0


@dataclass(frozen=True)
class Selection:
    """What was found: targets by name, and the reason for each weight left out."""

    targets: dict[str, Target] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        return {name: target.param for name, target in self.targets.items()}


def find_targets(
    model: nn.Module,
    targets: str | Sequence[str] | None = None,
    ignore: str | Sequence[str] | None = None,
) -> Selection:
    """The weights of `model` to compress.

    targets: class names ("Linear"), module names (whole, a trailing part, or a parent of what is
        meant: "bert.encoder.layer.0", "query"), or "re:" and a pattern to be found in the name of
        the weight. Without it: the matrices of all Linear and Conv1D layers and of stacked experts.
    ignore: the same, to leave out.

    Left out with a reason: embeddings and what is tied to them, projections of raw sound, output heads,
    routers, convolutions, norms, biases, adapters, frozen and packed weights. A whole name in `targets`
    overrides the reasons of choice (head, router, convolution, embedding, projection), not those of
    necessity.

    Raises ValueError when nothing is left, or when an entry matches no weight, naming near misses.
    """
    wanted, unwanted = _as_list("targets", targets), _as_list("ignore", ignore)
    selection = Selection()
    used: set[str] = set()
    heads = _head_modules(model)
    projections = _sound_projections(model)
    tied = _tied_parameters(model)
    seen: set[nn.Parameter] = set()
    for module_name, module in model.named_modules():
        for own_name, param in module.named_parameters(recurse=False):
            name = f"{module_name}.{own_name}" if module_name else own_name
            if param in seen:
                continue
            seen.add(param)
            hits = [entry for entry in wanted if _matches(entry, name, module_name, module)]
            misses = [entry for entry in unwanted if _matches(entry, name, module_name, module)]
            used.update(hits, misses)
            reason = _impossible(name, param, param in tied)
            if reason is None and misses:
                reason = f"ignored by {misses[0]!r}"
            named = any(entry in (name, module_name) for entry in hits)
            if reason is None and not named:
                reason = _unwise(module, module in heads, module in projections)
            if reason is None and wanted and not hits:
                reason = "not named in `targets`"
            if reason is None:
                selection.targets[name] = Target(name, param, input_dim(module))
            else:
                selection.skipped[name] = reason
    _check_all_used(model, wanted, unwanted, used)
    if not selection.targets:
        raise ValueError(
            f"targets={targets!r} with ignore={ignore!r} leave no weight of {type(model).__name__} "
            f"to compress. Left out: {'; '.join(counted(selection.skipped)[:5])}."
        )
    return selection


def split_targets(
    model: nn.Module, entries: Iterable[str], ignore: str | Sequence[str] | None = None
) -> tuple[Selection, dict[str, dict[str, Target]]]:
    """All that `entries` match, and the targets of each; what several match belongs to the first.

    Raises ValueError as `find_targets`, and for an entry whose weights all belong to earlier ones.
    """
    entries = list(entries)
    selection = find_targets(model, entries, ignore)
    groups: dict[str, dict[str, Target]] = {}
    taken: set[str] = set()
    for entry in entries:
        found = find_targets(model, entry, ignore).targets
        groups[entry] = {name: selection.targets[name] for name in found if name not in taken}
        taken.update(found)
        if not groups[entry]:
            raise ValueError(
                f"`sparsity` entry {entry!r}: all its weights belong to earlier entries. Put the "
                "special ones first."
            )
    return selection, groups


def _as_list(argument: str, entries: str | Sequence[str] | None) -> list[str]:
    if isinstance(entries, str):
        entries = [entries]
    elif entries is not None and not isinstance(entries, Iterable):
        raise ValueError(
            f"`{argument}` is a {type(entries).__name__}: pass class names, module names or 're:', "
            "one or a list of them."
        )
    entries = list(entries or [])
    for entry in entries:
        if not isinstance(entry, str) or not entry:
            raise ValueError(f"`{argument}` holds {entry!r}: pass class names, module names or 're:'.")
        if entry.startswith("re:"):
            try:
                re.compile(entry[3:])
            except re.error as error:
                raise ValueError(f"`{argument}` holds {entry!r}, no pattern: {error}.") from None
    return entries


def _matches(entry: str, name: str, module_name: str, module: nn.Module) -> bool:
    if entry.startswith("re:"):
        return re.search(entry[3:], name) is not None
    if entry == type(module).__name__:
        return True
    # As whole parts of the dotted name: "layer.1" is not found in "layer.11".
    return f".{entry}." in f".{name}."


def _impossible(name: str, param: nn.Parameter, tied: bool) -> str | None:
    if not param.is_floating_point():
        return f"packed as {param.dtype}: load the model without quantization to change its weights"
    if "lora_" in name or ".modules_to_save." in name:
        return "adapter"
    if param.dim() < 2 or name.endswith("bias"):  # those of experts are stacked too
        return "bias or norm"
    if not param.requires_grad:
        return "frozen: it is not trained"
    if tied:
        return "tied: the output head and the embedding are one tensor"
    return None


def _unwise(module: nn.Module, head: bool, projection: bool) -> str | None:
    kind = type(module).__name__
    if isinstance(module, nn.Embedding):
        return "embedding"
    if head:
        return "output head"
    if projection:
        return "projection of raw sound, the embedding of its model"
    if "Router" in kind or "Gate" in kind:
        return "router"
    if isinstance(module, (nn.Linear, Conv1D)) or "Experts" in kind:
        return None
    return f"{kind} weights are compressed only when named"


def input_dim(module: nn.Module) -> int:
    """The axis of the input features in the weights of `module`: see `Target`."""
    if isinstance(module, Conv1D):
        return 0
    if isinstance(module, nn.Linear):
        return 1
    # All experts of transformers say how they are stored, but Llama 4's.
    transposed = vars(module).get("is_transposed", type(module).__name__ == "Llama4TextExperts")
    return -2 if transposed else -1


def _head_modules(model: nn.Module) -> set[nn.Module]:
    """What is outside the backbone of a transformers model, and its output embeddings."""
    inner = without_adapters(model)
    if not isinstance(inner, PreTrainedModel):
        return set()
    output = inner.get_output_embeddings()
    heads = set() if output is None else {output}
    if inner.base_model is not inner:
        heads |= set(inner.modules()) - set(inner.base_model.modules())
    return heads


def _sound_projections(model: nn.Module) -> set[nn.Module]:
    """Of Wav2Vec2 and its kin, between convolutions and layers: the classes of transformers initialise
    them by name, and so cannot load them packed."""
    return {
        child
        for module in model.modules()
        if type(module).__name__.endswith("FeatureProjection")
        for child in module.children()
    }


def counted(skipped: Mapping[str, str]) -> list[str]:
    """The reasons for which weights were left out, each with its count, the most common first."""
    return [f"{count} x {reason}" for reason, count in Counter(skipped.values()).most_common()]


def without_adapters(model: nn.Module) -> Any:
    """The transformers model inside a PEFT model; any other model as it is."""
    # Who has such a model has imported peft. Importing it here would bring bitsandbytes along.
    peft: Any = sys.modules.get("peft")
    if peft is not None and isinstance(model, peft.PeftModel | peft.PeftMixedModel):
        return model.get_base_model()
    return model


def _tied_parameters(model: nn.Module) -> set[nn.Parameter]:
    """Parameters that belong to an embedding and to another module too."""
    owners: dict[nn.Parameter, int] = {}
    for module in model.modules():
        for param in module.parameters(recurse=False):
            owners[param] = owners.get(param, 0) + 1
    return {param for param, count in owners.items() if count > 1}


def _check_all_used(
    model: nn.Module, wanted: Sequence[str], unwanted: Sequence[str], used: set[str]
) -> None:
    for argument, entries in (("targets", wanted), ("ignore", unwanted)):
        for entry in entries:
            if entry not in used:
                names = {type(module).__name__ for module in model.modules()}
                for module_name, _ in model.named_modules():
                    names.update((module_name, module_name.rpartition(".")[2]))
                near = difflib.get_close_matches(entry.removeprefix("re:"), sorted(names), n=3)
                hint = f"near names: {', '.join(near)}" if near else "nothing has a name like it"
                raise ValueError(
                    f"`{argument}` entry {entry!r} matches no weight of {type(model).__name__}; {hint}."
                )
