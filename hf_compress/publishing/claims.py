"""What a card and its report claim of the files beside them, checked in the files."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_compress.measure import CompressionReport, Measurement, count_weights
from hf_compress.pruning.patterns import Pattern
from hf_compress.publishing.audit import Audit, audit
from hf_compress.publishing.evenness import fewest_bits
from hf_compress.publishing.integers import count_as_weights, float_weight
from hf_compress.publishing.naming import general_name, written_as
from hf_compress.publishing.recipe import bits_of
from hf_compress.quantization.grids import grouped
from hf_compress.targets import find_targets


@dataclass(frozen=True)
class Claim:
    """A number of the card beside what was found. ok: None where it was not checked, and `found` says
    why."""

    name: str
    claimed: Any
    found: Any
    ok: bool | None


def equal(name: str, claimed: Any, found: Any) -> Claim:
    """Of counts, and of floats that are computed from them in the same way."""
    numbers = isinstance(claimed, float) and isinstance(found, (int, float))
    same = math.isclose(claimed, found, rel_tol=1e-9) if numbers else claimed == found
    return Claim(name, claimed, found, same)


def file_claims(report: Mapping[str, Any], folder: Path, model: PreTrainedModel) -> Iterator[Claim]:
    """Each number that `report` claims of the weights in `folder`, counted anew.

    model: what is loaded from there, see `hf_compress.publishing.integers.reopen`.
    """
    found = _audit(report, folder, model)
    packed = bits_of(model)
    counts = count_weights(model) if packed or report.get("adapters") else found
    compressed, audited = report["compressed"], report["audit"]
    yield equal("bytes on disk", compressed["bytes"], found.file_bytes)
    yield equal("parameters", compressed["parameters"], counts.parameters)
    yield equal("non-zero parameters", compressed["nonzeros"], counts.nonzeros)
    yield equal("sparsity of all weights", audited["sparsity"], found.sparsity)
    yield equal("sparsity of the targeted weights", audited["target_sparsity"], found.target_sparsity)
    yield equal("second copies of tied tensors", audited["tied"], found.tied)
    if report["quantized"] or packed:
        yield equal("bits of the packed weights", report["quantized"], packed)
    if adapters := report.get("adapters"):
        yield equal("parameters of the adapters", adapters["parameters"], found.parameters)
    yield from _tensors(audited["tensors"], found)
    yield from _pruned(report["recipe"]["methods"], found, model, set(_widths(report)))
    if report["integers"]:
        yield from _integers(report, model)


def recovery_claims(report: Mapping[str, Any]) -> Iterator[Claim]:
    """Whether each recovery is the ratio of the scores beside it."""
    measured = CompressionReport(
        compressed=Measurement(**report["compressed"]),
        dense=Measurement(**report["dense"]) if report["dense"] else None,
        environment={},
    )
    for name, claimed in report["recovery"].items():
        yield equal(f"recovery of {name}, %", claimed, measured.recovery(name))


def _audit(report: Mapping[str, Any], folder: Path, model: PreTrainedModel) -> Audit:
    found = audit(folder)
    integers = report["integers"]
    if integers and integers["format"] != "dense":
        widths = _widths(report)
        weights = {name: float_weight(model, name) for name in widths}
        found = count_as_weights(found, _skeleton(model), weights, widths)
    # A target that is not there is one of the tensors that differ.
    return replace(found, targets=tuple(n for n in report["audit"]["targets"] if n in found.tensors))


def _widths(report: Mapping[str, Any]) -> dict[str, int]:
    """Bits of each weight on a grid, by name."""
    methods = report["recipe"]["methods"]
    return {name: bits for method in methods for name, bits in method.get("quantized", {}).items()}


def _skeleton(model: PreTrainedModel) -> PreTrainedModel:
    """The same architecture without values, as it was before it was packed."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        return type(model)(config)


def _tensors(claimed: Mapping[str, Mapping[str, Any]], found: Audit) -> Iterator[Claim]:
    """One row for all that are as claimed, and one for each that is not."""
    actual = {name: asdict(tensor) for name, tensor in found.tensors.items()}
    wrong = [
        (name, claimed.get(name), actual.get(name))
        for name in dict.fromkeys([*claimed, *actual])
        if _told(claimed.get(name)) != _told(actual.get(name))
    ]
    yield Claim("tensors as listed", len(claimed), len(actual.keys()) - len(wrong), not wrong)
    for name, said, is_there in wrong:
        yield Claim(f"tensor {name}", _told(said), _told(is_there), False)


def _told(tensor: Mapping[str, Any] | None) -> str:
    if tensor is None:
        return "absent"
    shape = "x".join(map(str, tensor["shape"]))
    return f"{tensor['dtype']} {shape}, {tensor['zeros']} zeros, {tensor['bytes']} bytes"


def _pruned(
    methods: Iterable[Mapping[str, Any]], found: Audit, model: PreTrainedModel, on_grids: set[str]
) -> Iterator[Claim]:
    for method in methods:
        if not method.get("weights"):
            continue
        plain = _skeleton(model)
        written = written_as(plain, method["weights"])
        sparsity = {
            name: found.sparsity_of(written[name])
            for name in method["weights"]
            if all(tensor in found.tensors for tensor in written[name])
        }
        # What is then rounded to a grid may hold more zeros.
        kept = sum(fraction > method["weights"][name] - 1e-6 for name, fraction in sparsity.items())
        count = len(method["weights"])
        yield Claim(f"{method['method']}: weights as sparse as listed", count, kept, kept == count)
        name = method.get("pattern", "unstructured")
        if name == "unstructured" or bits_of(model):
            continue
        title, pattern = f"{method['method']}: weights of pattern {name}", Pattern.parse(name)
        if pattern.group is None and on_grids & set(method["weights"]):
            yield Claim(title, count, "rounded since, to more zeros", None)
            continue
        targets = find_targets(plain, list(method["weights"])).targets
        right = sum(
            _follows(float_weight(model, weight), pattern, target.input_dim)
            for weight, target in targets.items()
        )
        yield Claim(title, count, right, right == count)


def _follows(weight: Tensor, pattern: Pattern, input_dim: int) -> bool:
    alive = weight != 0
    if pattern.group is not None and pattern.kept is not None:
        groups = grouped(alive, input_dim=input_dim, group_size=pattern.group)
        return bool((groups.sum(-1) <= pattern.kept).all())
    for axis, size in enumerate(pattern.block(weight.shape, input_dim)):
        # Blocks live and die together: along each axis all of a block are as its first.
        blocks = alive.unflatten(axis, (-1, size))
        if not (blocks == blocks.narrow(axis + 1, 0, 1)).all():
            return False
    return True


def _integers(report: Mapping[str, Any], model: PreTrainedModel) -> Iterator[Claim]:
    integers, widths = report["integers"], _widths(report)
    weights = {name: float_weight(model, name) for name in widths}
    yield equal("integers: weights", integers["weights"], len(weights))
    parameters = sum(weight.numel() for weight in weights.values())
    yield equal("integers: parameters", integers["parameters"], parameters)
    yield equal("integers: bits", integers["bits"], max(kind["bits"] for kind in integers["kinds"]))
    targets = find_targets(_skeleton(model), list(widths)).targets
    for kind in integers["kinds"]:
        # Those of one name and width that differ in their groups are told by what divides.
        names = [
            n for n, bits in widths.items() if (general_name(n), bits) == (kind["name"], kind["bits"])
        ]
        chosen = {
            name: weights[name]
            for name in names
            if _may_share(weights[name], targets[name].input_dim, kind["per_scale"])
        }
        title = f"{kind['name']}, {kind['bits']} bit"
        if not chosen:
            yield Claim(f"{title}: weights", kind["weights"], 0, False)
            continue
        bits = [
            fewest_bits(_groups(w, targets[n].input_dim, kind["per_scale"])) for n, w in chosen.items()
        ]
        fewest = None if None in bits else max(b for b in bits if b is not None)
        found = "on no such grid" if fewest is None else fewest
        # Short floats are too coarse to tell neighbouring widths apart.
        short = fewest is not None and any(w.dtype.itemsize < 4 for w in chosen.values())
        ok = fewest == kind["bits"] or (short and fewest <= kind["bits"])
        yield Claim(f"{title}: bits", kind["bits"], found, ok)
        if len(chosen) == kind["weights"]:
            size = sum(weight.numel() for weight in chosen.values())
            zeros = sum(int((weight == 0).sum()) for weight in chosen.values())
            yield equal(f"{title}: parameters", kind["parameters"], size)
            yield equal(f"{title}: zeros", kind["zeros"], zeros / size)


def _may_share(weight: Tensor, input_dim: int, per_scale: int) -> bool:
    """Whether so many weights can share a scale: a group of inputs, or a matrix."""
    matrix = weight.shape[-2] * weight.shape[-1]
    return per_scale == matrix or weight.shape[input_dim] % per_scale == 0


def _groups(weight: Tensor, input_dim: int, per_scale: int) -> Tensor:
    if weight.shape[input_dim] % per_scale:  # one scale for each matrix
        return grouped(weight, input_dim=input_dim, group_size="tensor")
    return grouped(weight, input_dim=input_dim, group_size=per_scale)
