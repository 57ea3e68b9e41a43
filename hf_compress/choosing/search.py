"""Choosing by experiment: predict, drop, train briefly, stop losers, finish the rest, choose."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Literal, Protocol

from hf_compress.choosing.candidates import Candidate
from hf_compress.choosing.halving import ranked, rungs
from hf_compress.choosing.limits import TOLERANCE, Limits, Measured
from hf_compress.choosing.records import Records

logger = logging.getLogger(__name__)

Prefer = Literal["score", "size", "latency"]
DENSE = "dense"


@dataclass(frozen=True, kw_only=True)
class Trained:
    """One training. score: of the validation rows, as the metric has it. seconds: of the training
    alone, without building and evaluating."""

    steps: int
    score: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A model that was trained fully, written, opened again and measured. test: score of the test rows,
    which chooses nothing. digest: of the weight files."""

    validation: float
    test: float
    measured: Measured
    digest: str
    training: Trained | None = None


@dataclass(frozen=True, kw_only=True)
class Exported:
    """The dense model or a finalist, `name`, as another runtime computes it.

    validation, test: its scores there. agreement: fraction of the test predictions whose most probable
    class is that of torch. measured: the files of the export, and speedup over dense in torch.
    """

    name: str
    runtime: str
    validation: float
    test: float
    agreement: float
    measured: Measured


class Work(Protocol):
    """What the search has done for it. Results are kept; each is asked for once."""

    def dense(self) -> Finished: ...

    def predict(self, candidate: Candidate) -> Measured: ...

    def train(self, candidate: Candidate, steps: int) -> Trained: ...

    def finish(self, candidate: Candidate, steps: int) -> Finished: ...

    def measure(self, name: str) -> Measured:
        """The model of `finish`, or of `dense`, once more: for a limit that was not asked before."""
        ...

    def is_whole(self, name: str, digest: str) -> bool:
        """Whether the model of `finish`, or of `dense`, is still there as it was."""
        ...


@dataclass(frozen=True, kw_only=True)
class Metric:
    """lower: whether less is better. points: what a drop is counted in: 100 where scores are in [0, 1],
    so that it is percentage points, else 1."""

    name: str
    lower: bool = False
    points: float = 100.0

    def drop(self, dense: float, score: float) -> float:
        """How much worse `score` is than `dense`; negative where it is better."""
        return self.points * (score - dense if self.lower else dense - score)

    def gain(self, score: float) -> float:
        """More is better."""
        return -score if self.lower else score


@dataclass(kw_only=True)
class Tried:
    """All that is known of a candidate. trainings: the shorter first; finished: of finalists only.
    excess: see `Limits.excess`, of what was measured last."""

    candidate: Candidate
    predicted: Measured
    trainings: list[Trained] = field(default_factory=list)
    finished: Finished | None = None
    excess: dict[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.candidate.name

    @property
    def measured(self) -> Measured:
        return self.predicted if self.finished is None else self.finished.measured


@dataclass(kw_only=True)
class Choice:
    """What the search found. winner: None where nothing meets the limits. tried: in the order of the
    space. steps: of a full training. exported: the dense model and finalists in other runtimes."""

    metric: Metric
    limits: Limits
    prefer: Prefer
    steps: int
    dense: Finished
    tried: list[Tried]
    winner: Tried | None = None
    exported: list[Exported] = field(default_factory=list)

    @property
    def finalists(self) -> list[Tried]:
        return [each for each in self.tried if each.finished is not None]

    def drop(self, each: Tried) -> float | None:
        """Of the validation score of a finalist; None of others."""
        if each.finished is None:
            return None
        return self.metric.drop(self.dense.validation, each.finished.validation)


def search(
    work: Work,
    candidates: Sequence[Candidate],
    limits: Limits,
    records: Records,
    *,
    metric: Metric,
    steps: int,
    finalists: int = 3,
    factor: int = 3,
    prefer: Prefer | None = None,
) -> Choice:
    """The best of `candidates` within `limits`.

    The dense model is measured, then what each candidate will weigh and take: those beyond the limits
    by more than `TOLERANCE` are dropped untrained. The others train by `rungs`, each rung from the
    start, since schedules depend on the length; `finalists` of them train for `steps`, are written and
    measured; with them count those that an earlier call finished. Where none of these meets the limits,
    others that trained in the last rung are finished too, until one does. Validation rows choose.

    prefer: what decides among those within the limits: "size" (where a drop is limited) or "score"
        (where not) by default, or "latency". Of equals the smaller wins.
    records: keeps each result as soon as it is there; with the same ones a search that was stopped goes
        on, and one with other limits begins with what is known.
    """
    prefer = prefer or ("size" if limits.drop is not None else "score")
    dense = _complete(
        records.once(DENSE, lambda: asdict(work.dense()), holds=partial(_is_whole, work, DENSE)),
        *(work, records, DENSE, limits),
    )
    tried = []
    for number, candidate in enumerate(candidates, start=1):
        logger.info("predicting %s (%d of %d)", candidate.name, number, len(candidates))
        each = Tried(candidate=candidate, predicted=_predicted(work, records, candidate, limits))
        each.excess = limits.excess(each.predicted)
        tried.append(each)
    choice = Choice(metric=metric, limits=limits, prefer=prefer, steps=steps, dense=dense, tried=tried)
    alive = [each for each in tried if all(far <= TOLERANCE for far in each.excess.values())]
    logger.info("%d of %d candidates can meet the limits", len(alive), len(tried))
    if not alive:
        return choice
    possible = alive
    waiting: list[Tried] = []
    for rung in rungs(len(alive), steps, finalists=finalists, factor=factor):
        for each in alive:
            each.trainings.append(_trained(work, records, each.candidate, rung.steps))
        order = _ranked(choice, alive)
        alive, waiting = order[: rung.keep], order[rung.keep :]
        logger.info("after %d steps %s go on", rung.steps, ", ".join(each.name for each in alive))
    for each in alive:
        _finish(work, records, choice, each)
    # The finalists of earlier calls with other limits cost nothing more.
    for each in possible:
        if each.finished is None:
            _recall(work, records, choice, each)
    # A short training may have flattered the finalists; what scored higher is tried before it is said
    # that nothing meets the limits.
    waiting = [each for each in waiting if each.finished is None]
    by_score = sorted(waiting, key=lambda each: metric.gain(each.trainings[-1].score), reverse=True)
    for each in by_score:
        if any(not finalist.excess for finalist in choice.finalists):
            break
        _finish(work, records, choice, each)
    choice.winner = _winner(choice)
    return choice


def _complete(
    found: dict[str, Any], work: Work, records: Records, name: str, limits: Limits
) -> Finished:
    """From what `asdict` made of it, with all that is limited measured."""
    measured, training = found["measured"], found["training"]
    if limits.memory is not None and measured["memory"] is None:
        measured = records.once(f"{name}.measured", lambda: asdict(work.measure(name)))
    return Finished(
        **found
        | {
            "measured": Measured(**measured),
            "training": None if training is None else Trained(**training),
        }
    )


def _predicted(work: Work, records: Records, candidate: Candidate, limits: Limits) -> Measured:
    found = records.once(
        f"{candidate.name}.predicted",
        lambda: asdict(work.predict(candidate)),
        # An earlier call may not have asked for the memory.
        holds=lambda found: limits.memory is None or found["memory"] is not None,
    )
    return Measured(**found)


def _trained(work: Work, records: Records, candidate: Candidate, steps: int) -> Trained:
    def make() -> dict[str, Any]:
        trained = work.train(candidate, steps)
        told = (candidate.name, trained.steps, trained.score, trained.seconds)
        logger.info("trained %s for %d steps: %.4f, in %.1f s", *told)
        return asdict(trained)

    return Trained(**records.once(f"{candidate.name}.{steps}steps", make))


def _finish(work: Work, records: Records, choice: Choice, each: Tried) -> None:
    def make() -> dict[str, Any]:
        logger.info("training %s fully, for %d steps", each.name, choice.steps)
        return asdict(work.finish(each.candidate, choice.steps))

    found = records.once(f"{each.name}.finished", make, holds=partial(_is_whole, work, each.name))
    _judge(work, records, choice, each, found)


def _recall(work: Work, records: Records, choice: Choice, each: Tried) -> None:
    """As `_finish`, where an earlier call trained it fully and its files are still there."""
    found = records.find(f"{each.name}.finished", holds=partial(_is_whole, work, each.name))
    if found is not None:
        _judge(work, records, choice, each, found)


def _judge(work: Work, records: Records, choice: Choice, each: Tried, found: dict[str, Any]) -> None:
    each.finished = _complete(found, work, records, each.name, choice.limits)
    each.excess = choice.limits.excess(each.finished.measured, choice.drop(each))


def _is_whole(work: Work, name: str, found: dict[str, Any]) -> bool:
    return work.is_whole(name, found["digest"])


def _ranked(choice: Choice, alive: Sequence[Tried]) -> list[Tried]:
    metric, limit = choice.metric, choice.limits.drop
    enough = None
    if choice.prefer != "score":
        # The gain of the dense model less what may be lost; without a limit nothing is enough.
        dense = metric.gain(choice.dense.validation)
        enough = float("inf") if limit is None else dense - limit / metric.points
    return ranked(
        alive,
        [metric.gain(each.trainings[-1].score) for each in alive],
        [_cost(choice, each) for each in alive],
        enough=enough,
    )


def _cost(choice: Choice, each: Tried) -> float:
    # Of the time the ratio to dense: milliseconds were taken at different moments.
    return 1 / each.measured.speedup if choice.prefer == "latency" else float(each.measured.bytes)


def _winner(choice: Choice) -> Tried | None:
    within = [each for each in choice.finalists if not each.excess]

    def key(each: Tried) -> tuple[float, ...]:
        assert each.finished is not None
        gain, size = choice.metric.gain(each.finished.validation), each.measured.bytes
        if choice.prefer == "score":
            return -gain, size
        return _cost(choice, each), size, -gain

    return min(within, key=key, default=None)
