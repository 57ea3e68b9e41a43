"""The units of a model: what can be removed, and the parts of its weights that each unit owns.

Every unit has the same anatomy: modules that write it as their output features, and one module that
reads it as its input.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import __version__ as transformers_version
from transformers.pytorch_utils import Conv1D

from hf_compress.pruning.structure.anatomy import Slice, Units, name_of
from hf_compress.pruning.structure.architectures import (
    ARCHITECTURES,
    KINDS,
    Architecture,
    Kind,
    Stack,
    Wiring,
)
from hf_compress.pruning.structure.hidden import hidden_units
from hf_compress.targets import without_adapters


def find_units(model: PreTrainedModel, kinds: Iterable[Kind] | None = None) -> list[Units]:
    """The units of `kinds` in `model`, in the order of its layers; by default of all it can lose.

    Raises ValueError where removal could not be right: not a transformers model, an architecture
    that is not in the table, a kind that its config cannot express (saying what can be removed
    instead), packed or offloaded weights, adapters.
    """
    architecture = _architecture(model)
    reasons = {kind: _why_not(model.config, architecture, kind) for kind in KINDS}
    possible = [kind for kind in KINDS if reasons[kind] is None]
    found: list[Units] = []
    for kind in possible if kinds is None else kinds:
        units = _found(model, architecture, kind)
        if kind not in possible or (kinds is not None and not units):
            raise ValueError(
                f"{kind} cannot be removed from {type(model).__name__}: "
                f"{reasons[kind] or f'transformers {transformers_version} builds it without'}. "
                f"What can be: {', '.join(possible)}."
            )
        found.extend(units)
    return found


def _architecture(model: PreTrainedModel) -> Architecture:
    if without_adapters(model) is not model:
        raise ValueError(
            "the model carries PEFT adapters, whose shapes follow the layers under them: merge them "
            "first (`model.merge_and_unload()`)."
        )
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"{type(model).__name__} is not a transformers model: pass the model itself.")
    for name, param in model.named_parameters():
        if not param.is_floating_point():
            raise ValueError(
                f"{name} is packed as {param.dtype}: load the model without quantization, and "
                "quantize what is left."
            )
        if param.is_meta:
            raise ValueError(f"{name} is offloaded: load the whole model to one device.")
    if model.config.model_type not in ARCHITECTURES:
        raise ValueError(
            f"nothing is known about the structure of {type(model).__name__} (model type "
            f"{model.config.model_type!r}); known are {', '.join(sorted(ARCHITECTURES))}."
        )
    return ARCHITECTURES[model.config.model_type]


def _why_not(config: PreTrainedConfig, architecture: Architecture, kind: Kind) -> str | None:
    if kind in architecture.cannot:
        return architecture.cannot[kind]
    if kind == "hidden":
        return None if architecture.hidden is not None else "it has none"
    if kind != "layers":
        return None if any(vars(s)[kind] for s in architecture.stacks) else "it has none"
    settings = config.to_dict()
    if settings.get("scale_attn_by_inverse_layer_idx"):
        return "`scale_attn_by_inverse_layer_idx` ties each layer to its number"
    if settings.get("mlp_only_layers") or settings.get("decoder_sparse_step", 1) != 1:
        return "which of them have experts follows from their number"
    if settings.get("use_weighted_layer_sum"):
        return "`use_weighted_layer_sum` has a weight for each of them"
    return None


def _found(model: PreTrainedModel, architecture: Architecture, kind: Kind) -> list[Units]:
    """The units of `kind`; an encoder alone or a decoder alone lacks a stack."""
    stacks = {}
    for stack in architecture.stacks:
        layers = _module(model.base_model, stack.layers)
        if layers is not None:
            stacks[name_of(model, layers)] = stack
    if kind == "hidden":
        hidden = architecture.hidden
        return [] if hidden is None else [hidden_units(model, hidden, stacks)]
    return [u for path, stack in stacks.items() for u in _units(model, path, stack, kind)]


def _units(model: PreTrainedModel, path: str, stack: Stack, kind: Kind) -> list[Units]:
    """Those inside the layers at `path`, or the layers."""
    names = [f"{path}.{number}" for number, _ in model.get_submodule(path).named_children()]
    if kind == "layers":
        return [
            Units(
                name=path,
                kind=kind,
                count=len(names),
                fields=(stack.depth,),
                slices=(),
                readers=tuple(names),
                masks=(stack.mask,) * len(names),
                pinned=f"{path}.0.{stack.pinned}." if stack.pinned else None,
            )
        ]
    found = []
    for wiring in vars(stack)[kind]:
        # In a mixture some layers may have no experts.
        wired = [name for name in names if _module(model, f"{name}.{wiring.reader}") is not None]
        if wiring.aligned and wired:
            found.append(_wired(model, wiring, kind, f"{path}.*", wired, stack.mask))
        elif wired:
            found.extend(_wired(model, wiring, kind, name, [name], stack.mask) for name in wired)
    return found


def _wired(
    model: PreTrainedModel, wiring: Wiring, kind: Kind, place: str, layers: list[str], mask: str | None
) -> Units:
    readers = [f"{layer}.{wiring.reader}" for layer in layers]
    writers = [f"{layer}.{writer}" for layer in layers for writer in wiring.writers]
    if kind == "experts":  # the rows of the router go with them
        owned = _features(model, [*writers, *readers], reads=False)
    else:
        owned = _features(model, writers, reads=False) + _features(model, readers, reads=True)
    if kind == "ffn":  # which the config of GPT-2 may leave unsaid
        _, matrix, dim = owned[-1]
        count = matrix.shape[dim]
    else:
        count = min(getattr(model.config, field) for field in wiring.fields)
    return Units(
        name=f"{place}.{wiring.reader}",
        kind=kind,
        count=count,
        fields=wiring.fields,
        slices=tuple(Slice(name, param, dim, param.shape[dim] // count) for name, param, dim in owned),
        readers=tuple(readers),
        masks=(mask,) * len(readers),
    )


def _features(
    model: PreTrainedModel, modules: Iterable[str], *, reads: bool
) -> list[tuple[str, nn.Parameter, int]]:
    """Name, parameter and dimension of what belongs to the features that modules read or write; for
    stacked experts the dimension of the experts. Modules that the model lacks are passed over."""
    found = []
    for module_name in modules:
        module = _module(model, module_name)
        if module is None:
            continue
        transposed = isinstance(module, (Conv1D, nn.Embedding))
        for name, param in module.named_parameters(recurse=False):
            if param.dim() > 1:
                found.append((f"{module_name}.{name}", param, int(reads != transposed)))
            elif not reads:  # what a reader adds, it adds whatever it reads
                found.append((f"{module_name}.{name}", param, 0))
    return found


def _module(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None
