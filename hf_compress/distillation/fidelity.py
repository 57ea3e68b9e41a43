"""How much of a teacher is left in 8 or 4 bits, or in answers that were kept of it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import send_to_device
from datasets import Dataset
from torch import Tensor, nn

from hf_compress.distillation.cache.asking import Collate
from hf_compress.distillation.cache.cells import OUTPUTS, Origin
from hf_compress.distillation.cache.collator import CachedCollator
from hf_compress.distillation.cache.loading import default_collator, loaded, used_columns
from hf_compress.distillation.cache.teacher import CachedTeacher, origin_of
from hf_compress.distillation.divergences import Divergence
from hf_compress.distillation.tasks.heads import Head
from hf_compress.distillation.tasks.task import Sums
from hf_compress.distillation.teachers import FrozenTeacher, Teacher
from hf_compress.frozen import evaluating
from hf_compress.targets import without_adapters

logger = logging.getLogger(__name__)

Batch = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """One way to have a teacher.

    name: as the table calls it. bits: None for full precision and for kept answers. kl: KL(this one ||
    full one), the mean over items in nats: what a student would still be charged who is the full
    teacher (of a regression the squared error). agreement: how often its first choice is the full
    teacher's, in [0, 1]; None where that means nothing. memory: bytes of its parameters. known: how
    much of the probability it tells of, in [0, 1]; None for a sample, which tells of all on average.
    """

    name: str
    bits: int | None
    kl: float
    agreement: float | None
    memory: int
    known: float | None = 1.0


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Several ways to have one teacher, the full one first. `str()` is a table."""

    ways: tuple[Fidelity, ...]
    rows: int
    items: int
    temperature: float

    def cheapest(self, max_kl: float) -> Fidelity:
        """The one of least memory whose `kl` is at most `max_kl`, >= 0 (that of the full one)."""
        if not max_kl >= 0:
            raise ValueError(f"`max_kl` is {max_kl}: pass a number >= 0, such as 0.01.")
        return min((way for way in self.ways if way.kl <= max_kl), key=lambda way: way.memory)

    def __str__(self) -> str:
        lines = [f"{'teacher':<24}{'KL':>10}{'agreement':>12}{'known':>12}{'memory':>12}"]
        for way in self.ways:
            agreement = "" if way.agreement is None else f"{way.agreement:.2%}"
            known = "on average" if way.known is None else f"{way.known:.1%}"
            memory = f"{way.memory / 1e6:.1f} MB"
            lines.append(f"{way.name:<24}{way.kl:>10.2e}{agreement:>12}{known:>12}{memory:>12}")
        lines.append(
            f"Over {self.items} items of {self.rows} rows, at temperature {self.temperature:g}."
        )
        return "\n".join(lines)


def compare_teachers(
    teacher: nn.Module | str,
    dataset: Dataset,
    *,
    bits: Sequence[int] = (8, 4),
    rows: int = 64,
    batch_size: int = 8,
    temperature: float | None = None,
    data_collator: Collate | None = None,
    processing_class: Any = None,
) -> Comparison:
    """The full teacher beside itself in `bits`, and beside its kept answers where `dataset` has some.

    teacher: a model with a head that is known, where it is, or a path or hub id. dataset: as for the
    training, of which the first `rows` are asked about; with the column of `precompute_teacher` these
    answers are compared too. temperature: by default that of the answers, or 1. data_collator,
    processing_class: as of Trainer. The full teacher and one other are in memory at a time.

    Raises ValueError for rows without labels that count, or whose answers are to other inputs;
    ImportError for bits without bitsandbytes.
    """
    model, head = loaded(teacher, None)
    collate = data_collator or default_collator(processing_class)
    origin = origin_of(dataset) if OUTPUTS in dataset.column_names else None
    columns = used_columns(dataset.column_names, model, head)
    if origin is not None:
        columns.append(OUTPUTS)
        inner: Any = without_adapters(model)
        collate = CachedCollator(collate, {OUTPUTS: origin}, inner.main_input_name)
        temperature = origin.temperature if temperature is None else temperature
    chosen = [
        {name: row[name] for name in columns} for row in dataset.select(range(min(rows, len(dataset))))
    ]
    return _compare(
        _batches(chosen, collate, batch_size),
        teacher,
        bits=bits,
        temperature=1.0 if temperature is None else temperature,
        origin=origin,
    )


def compare_bits(
    given: Sequence[nn.Module | str],
    examples: Sequence[Any],
    collate: Collate,
    divergence: Divergence,
) -> Comparison:
    """The full teacher beside 8 and 4 bit on `examples`, at the temperature of `divergence`.

    Raises ValueError where `given` is not one teacher of its own.
    """
    if len(given) > 1 or (isinstance(given[0], str) and given[0] in ("base", "cached")):
        raise ValueError(
            "teacher_bits='auto' compares the precisions of one teacher, not of 'base', 'cached' or "
            "several: choose yourself, see `compare_teachers`."
        )
    comparison = _compare(
        _batches(examples, collate, 8),
        given[0],
        bits=(8, 4),
        temperature=divergence.taught_temperature,
        origin=None,
    )
    logger.info("The teacher in several precisions:\n%s", comparison)
    return comparison


def _batches(examples: Sequence[Any], collate: Collate, size: int) -> list[Batch]:
    return [collate(list(examples[i : i + size])) for i in range(0, len(examples), size)]


@torch.no_grad()
def _compare(
    batches: Sequence[Batch],
    teacher: nn.Module | str,
    *,
    bits: Sequence[int],
    temperature: float,
    origin: Origin | None,
) -> Comparison:
    """Of collated rows; origin: of the kept answers that are among them."""
    full, head = loaded(teacher, None)
    reference = _Reference(full, head, batches, Divergence(temperature=temperature))
    with evaluating(full):
        ways = [reference.way("full", FrozenTeacher(full), full)]
        for number in bits:
            # A module without bits is its own copy; a path is read again.
            quantized, _ = loaded(teacher, number)
            asked = FrozenTeacher(quantized)
            ways.append(reference.way(f"{number} bit", asked, quantized, bits=number))
            del quantized, asked
        if origin is not None:
            kept = CachedTeacher(full, head, origin)
            ways.append(reference.way(f"cached {origin.what}", kept, known=_known(batches, origin)))
    return Comparison(
        ways=tuple(ways),
        rows=sum(len(batch[head.labels[0]]) for batch in batches),
        items=reference.items,
        temperature=temperature,
    )


class _Reference:
    """The full teacher, which others are compared with on `batches`.

    items: that were compared. Raises ValueError where there is none.
    """

    def __init__(
        self, full: nn.Module, head: Head, batches: Sequence[Batch], divergence: Divergence
    ) -> None:
        self._full = FrozenTeacher(full)
        self._inner: Any = without_adapters(full)
        self._head = head
        self._task = head.task(self._inner, batches[0])
        # Numbers have no temperature; the others' distance comes with its square.
        self._scale = divergence.temperature**2 if self._task.agreement else 1.0
        self._divergence = divergence
        self._device = next(full.parameters()).device
        self._batches = [send_to_device(dict(batch), self._device) for batch in batches]
        self.items = int(sum(self._task.count(batch).sum() for batch in self._batches))
        if not self.items:
            raise ValueError("The rows have no label that counts: pass more `rows`.")

    def way(
        self,
        name: str,
        other: Teacher,
        model: nn.Module | None = None,
        *,
        bits: int | None = None,
        known: float | None = 1.0,
    ) -> Fidelity:
        device = self._device if model is None else next(model.parameters()).device
        parameters = [] if model is None else list(model.parameters())
        sums = [self._sums(other, batch, device) for batch in self._batches]
        items, _, distance, agreed = (torch.stack(values).sum(0) for values in zip(*sums, strict=True))
        mean, same = ((total / items).mean().item() for total in (distance, agreed))
        return Fidelity(
            name=name,
            bits=bits,
            kl=mean / self._scale,
            agreement=same if self._task.agreement else None,
            memory=sum(parameter.nbytes for parameter in parameters),
            known=known,
        )

    def _sums(self, other: Teacher, batch: Batch, device: torch.device) -> Sums:
        features = self._head.inputs(self._inner, batch)
        answer = other(send_to_device(features, device))
        return self._task.sums(self._full(features), [answer], batch, divergence=self._divergence)


def _known(batches: Sequence[Batch], origin: Origin) -> float | None:
    if origin.what != "topk":
        return None if origin.what == "sampled" else 1.0
    rest: Tensor = torch.cat([batch[OUTPUTS]["rest"] for batch in batches])
    return 1 - rest.float().exp().mean().item()
