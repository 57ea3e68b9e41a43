"""What a choice is told as: a table, a sentence, the time that was saved, JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

from hf_compress.choosing.halving import nondominated
from hf_compress.choosing.limits import Measured, told
from hf_compress.choosing.search import DENSE, Choice, Exported, Tried

COLUMNS = ("model", "steps", "validation", "test", "MB", "ms", "times faster", "verdict")


def table(choice: Choice) -> list[tuple[str, ...]]:
    """Rows of `COLUMNS`: the dense model, finalists, those that were stopped, those that were never
    trained, the smaller first; then what was exported. Test scores are of finalists only."""
    dense = choice.dense
    steps = "-" if dense.training is None else str(dense.training.steps)
    first = (DENSE, steps, *_scores(dense.validation, dense.test), *_sizes(dense.measured), "")
    tried = (_row(choice, each) for each in _ordered(choice))
    return [first, *tried, *(_exported_row(choice, each) for each in choice.exported)]


def in_lines(rows: list[tuple[str, ...]]) -> str:
    """The table for a terminal."""
    everything = [COLUMNS, *rows]
    widths = [max(len(row[place]) for row in everything) for place in range(len(COLUMNS))]
    lines = []
    for row in everything:
        cells = [
            cell.ljust(width) if place in (0, len(COLUMNS) - 1) else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def sentence(choice: Choice) -> str:
    """Why the winner won, or which limit nothing meets, and what came nearest; then the best of
    the exports, which wins nothing."""
    why = _nothing(choice) if choice.winner is None else _won(choice, choice.winner)
    best = _best_exported(choice)
    if best is None:
        return why
    return (
        f"{why} Of the {len(choice.exported)} exports {best.name} in {best.runtime} "
        f"{_superlative(choice)} within the limits: validation {choice.metric.name} "
        f"{best.validation:.4f}, {best.measured.bytes / 1e6:.1f} MB, {best.measured.speedup:.1f} times "
        "faster than the dense model in torch."
    )


def _won(choice: Choice, winner: Tried) -> str:
    dense = choice.dense
    assert winner.finished is not None
    within = sum(not each.excess for each in choice.finalists)
    what = _superlative(choice)
    group = f"of the {within} finalists within" if within > 1 else "the only finalist within"
    verb = f"{what} {group}" if within > 1 else f"is {group}"
    size = dense.measured.bytes / winner.measured.bytes
    return (
        f"{winner.name} {verb} {_limits(choice)}: validation {choice.metric.name} "
        f"{winner.finished.validation:.4f} where the dense model has {dense.validation:.4f}, "
        f"{winner.measured.bytes / 1e6:.1f} MB ({size:.1f} times smaller), "
        f"{winner.measured.latency_ms:.1f} ms ({winner.measured.speedup:.1f} times faster)."
    )


def _best_exported(choice: Choice) -> Exported | None:
    """The best score of those whose cost is within a percent of the least: files of one format are all
    but equal in size, whatever their integers are."""
    metric, dense = choice.metric, choice.dense
    costs: dict[str, Callable[[Measured], float]] = {
        "score": lambda measured: 0.0,
        "size": lambda measured: measured.bytes,
        "latency": lambda measured: 1 / measured.speedup,
    }
    cost = costs[choice.prefer]
    within = [
        each
        for each in choice.exported
        if not choice.limits.excess(each.measured, metric.drop(dense.validation, each.validation))
    ]
    least = min((cost(each.measured) for each in within), default=0.0)
    close = [each for each in within if cost(each.measured) <= 1.01 * least]
    return max(close, key=lambda each: metric.gain(each.validation), default=None)


def _superlative(choice: Choice) -> str:
    return {
        "score": f"has the best validation {choice.metric.name}",
        "size": "is the smallest",
        "latency": "is the fastest",
    }[choice.prefer]


def nearest(choice: Choice, count: int = 3) -> list[Tried]:
    """Those that miss the limits by the least, by the one that each misses most."""
    pool = choice.finalists or choice.tried
    return sorted(pool, key=lambda each: max(each.excess.values(), default=0.0))[:count]


def seconds(choice: Choice) -> dict[str, float]:
    """What the trainings took, and what full ones of every candidate that was trained would have:
    measured where there was one, else by the candidate's own time for a step."""
    spent = full = 0.0
    for each in choice.tried:
        trainings = list(each.trainings)
        if each.finished is not None and each.finished.training is not None:
            trainings.append(each.finished.training)
        if trainings:
            spent += sum(training.seconds for training in trainings)
            # The longest knows best; of a full one it is what was measured.
            full += trainings[-1].seconds / trainings[-1].steps * choice.steps
    return {
        "trainings": spent,
        "every_candidate_fully": full,
        "share_saved": 1 - spent / full if full else 0.0,
    }


def front(choice: Choice) -> list[Tried]:
    """The finalists that no other is smaller, faster and better than at once."""
    found = choice.finalists
    points = [
        (-choice.metric.gain(e.finished.validation), float(e.measured.bytes), 1 / e.measured.speedup)
        for e in found
        if e.finished is not None
    ]
    return [found[place] for place in nondominated(points)]


def to_dict(choice: Choice) -> dict[str, Any]:
    """JSON of all that was measured."""
    return {
        "metric": choice.metric.name,
        "limits": choice.limits.told(),
        "prefer": choice.prefer,
        "winner": None if choice.winner is None else choice.winner.name,
        "sentence": sentence(choice),
        "columns": list(COLUMNS),
        "table": [list(row) for row in table(choice)],
        "front": [each.name for each in front(choice)],
        "seconds": seconds(choice),
        "dense": asdict(choice.dense),
        "exported": [asdict(each) for each in choice.exported],
        "tried": [{"name": each.name, **asdict(each)} for each in choice.tried],
    }


def _ordered(choice: Choice) -> Iterator[Tried]:
    def stage(each: Tried) -> tuple[int, int]:
        known = 0 if each.finished is not None else 1 if each.trainings else 2
        return known, each.measured.bytes

    yield from sorted(choice.tried, key=stage)


def _row(choice: Choice, each: Tried) -> tuple[str, ...]:
    if each.finished is not None:
        scores = _scores(each.finished.validation, each.finished.test)
        return (each.name, str(choice.steps), *scores, *_sizes(each.measured), _verdict(choice, each))
    if each.trainings:
        last = each.trainings[-1]
        stopped = f"stopped: others did better after {last.steps} steps"
        return (each.name, str(last.steps), f"{last.score:.4f}", "-", *_sizes(each.predicted), stopped)
    return (each.name, "0", "-", "-", *_sizes(each.predicted), _verdict(choice, each))


def _exported_row(choice: Choice, each: Exported) -> tuple[str, ...]:
    scores = _scores(each.validation, each.test)
    drop = choice.metric.drop(choice.dense.validation, each.validation)
    excess = choice.limits.excess(each.measured, drop)
    verdict = _misses(choice, each.measured, drop, excess) or "within the limits"
    return (f"{each.name}, {each.runtime}", "-", *scores, *_sizes(each.measured), verdict)


def _verdict(choice: Choice, each: Tried) -> str:
    if each.excess:
        return _misses(choice, each.measured, choice.drop(each), each.excess)
    return "chosen" if each is choice.winner else "within the limits"


def _misses(choice: Choice, measured: Measured, drop: float | None, excess: Mapping[str, float]) -> str:
    values = {
        "size": measured.bytes,
        "latency": measured.latency_ms,
        "speedup": measured.speedup,
        "memory": measured.memory,
        "drop": drop,
    }
    parts = []
    for name in excess:
        value = values[name]
        assert value is not None
        side = "at least" if name == "speedup" else "at most"
        parts.append(f"{name} {told(name, value)}, {side} {choice.limits.told()[name]}")
    return "; ".join(parts)


def _scores(validation: float, test: float) -> tuple[str, str]:
    return f"{validation:.4f}", f"{test:.4f}"


def _sizes(measured: Measured) -> tuple[str, str, str]:
    return (
        f"{measured.bytes / 1e6:.2f}",
        f"{measured.latency_ms:.2f}",
        f"{measured.speedup:.2f}",
    )


def _limits(choice: Choice) -> str:
    words = {"drop": "a drop of {}", "size": "{}", "latency": "{}", "speedup": "{} faster"}
    given = choice.limits.told()
    return ", ".join(words.get(name, "{} of memory").format(text) for name, text in given.items())


def _nothing(choice: Choice) -> str:
    first = nearest(choice)[0]
    if not first.excess:
        return "Nothing was trained to the end."
    name = max(first.excess, key=lambda limit: first.excess[limit])
    missing = sum(name in each.excess for each in choice.finalists or choice.tried)
    of = len(choice.finalists) or len(choice.tried)
    stage = "trained" if choice.finalists else "untrained, as its size and latency were predicted"
    return (
        f"Nothing meets the limits. The one that binds is `{name}`: {missing} of {of} candidates miss "
        f"it ({stage}). The nearest is {first.name}: {_verdict(choice, first)}."
    )
