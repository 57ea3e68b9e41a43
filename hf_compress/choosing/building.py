"""From a candidate to its model, not yet trained, and to what that will weigh and how fast it is."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import PreTrainedModel

from hf_compress.calibration.batches import Batch
from hf_compress.choosing.candidates import Candidate
from hf_compress.choosing.limits import Measured
from hf_compress.distillation.layers import init_student
from hf_compress.example_inputs import example_inputs
from hf_compress.latency import compare_latency
from hf_compress.measure import bytes_on_disk, peak_memory
from hf_compress.pruning.structure.removal import prune_structure
from hf_compress.quantization.export import save_quantized
from hf_compress.quantization.grids import check_divides
from hf_compress.quantization.oneshot import quantize_oneshot_
from hf_compress.targets import find_targets

FORMAT = "compressed-tensors"
"""How weights of few bits are stored."""


@dataclass(frozen=True, kw_only=True)
class Timed:
    """The pass that is timed: rows, tokens or samples of each (None for what has none), how often."""

    batch: int
    length: int | None
    runs: int = 30


def smaller(
    candidate: Candidate, model: PreTrainedModel, calibration: Sequence[Batch] | None = None
) -> PreTrainedModel:
    """`model` without the layers, neurons and heads that `candidate` removes; itself where none.

    calibration: labelled batches by which their Taylor scores are found. Without them the choice is by
    magnitude: as good where only the shapes matter.
    Raises ValueError as `prune_structure` and `init_student`.
    """
    if candidate.student_layers is not None:
        model = init_student(model, candidate.student_layers)
    if candidate.layers is None and not candidate.ffn and not candidate.heads:
        return model
    return prune_structure(
        model,
        ffn=candidate.ffn,
        heads=candidate.heads,
        layers=candidate.layers,
        score="magnitude" if calibration is None else "taylor",
        calibration=calibration,
        # A group of weights that share a scale must not reach beyond its row.
        round_to=candidate.group_size or 1,
    )


def check(candidates: Iterable[Candidate], model: PreTrainedModel) -> None:
    """Raises ValueError where `model` cannot lose, or be stored as, what one of `candidates` asks."""
    shapes: dict[Candidate, None] = {}
    for each in candidates:
        shapes[replace(each, vocabulary=False, distil=True, sparsity=0.0)] = None
    for shape in shapes:
        try:
            built = smaller(shape, model)
            if shape.bits is not None:
                for name, target in find_targets(built).targets.items():
                    check_divides(
                        name, target.param, input_dim=target.input_dim, group_size=shape.group_size
                    )
        except ValueError as error:
            raise ValueError(f"candidate {shape.name} of the space: {error}") from error


def predict(
    candidate: Candidate,
    model: PreTrainedModel,
    dense: PreTrainedModel,
    timed: Timed,
    *,
    folder: Path,
    memory: bool = False,
) -> Measured:
    """What `candidate` will weigh and how fast it will be, by building it untrained and measuring that:
    neither depends on the values of the weights.

    model: the dense model, with its vocabulary cut where `candidate` cuts it; it is left as it is.
    folder: where the built model is written meanwhile. dense, timed, memory: see `measure`.
    """
    built = smaller(candidate, model)
    with TemporaryDirectory(dir=folder, prefix=".") as place:
        if candidate.bits is None:
            built.save_pretrained(place)
        else:
            built = copy.deepcopy(built) if built is model else built
            grids = quantize_oneshot_(
                built, bits=candidate.bits, group_size=candidate.group_size, grid="absmax"
            )
            save_quantized(built, place, grids=grids, format=FORMAT)
        return measure(Path(place), dense, timed, memory=memory)


def measure(folder: Path, dense: PreTrainedModel, timed: Timed, *, memory: bool = False) -> Measured:
    """The model in `folder`, as plain transformers load it, in turn with `dense`, of the same class.

    memory: measure the peak memory too, in a process of its own.
    """
    kind: Any = type(dense)
    compressed = kind.from_pretrained(folder).to(dense.device)
    # Of the smaller vocabulary, whose numbers the dense model has too.
    inputs = example_inputs(compressed, batch=timed.batch, length=timed.length)
    times = compare_latency({"dense": dense, "compressed": compressed}, inputs, runs=timed.runs)
    return Measured(
        bytes=bytes_on_disk(folder),
        latency_ms=times["compressed"].median_ms,
        speedup=times["dense"].median_ms / times["compressed"].median_ms,
        memory=peak_memory(folder, kind.__name__, inputs) if memory else None,
    )


def texts_within(tokenizer: Any, texts: Sequence[str], length: int) -> Iterator[str]:
    """`texts` without the words that the first `length` tokens do not reach: what a model that reads so
    many has ever seen of them. tokenizer: a fast one."""
    for text in texts:
        offsets = tokenizer(text, truncation=True, max_length=length, return_offsets_mapping=True)[
            "offset_mapping"
        ]
        end = max((stop for _, stop in offsets), default=0)
        # To the end of the word: its first half alone may be cut into other tokens.
        rest = text[end:].split(maxsplit=1)
        inside = bool(rest) and not text[end].isspace()
        yield text[: end + len(rest[0])] if inside else text[:end]
