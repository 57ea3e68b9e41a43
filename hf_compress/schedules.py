"""Schedules: a value as a pure function of the optimizer step.

Nothing here counts calls: a schedule asked twice for the same step gives the same answer, so that
a resumed run, a skipped fp16 step and a retried batch size all see what an uninterrupted run saw.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

Shape = Callable[[float], float]
"""Progress in [0, 1] -> the part of the way from the first value to the last, in [0, 1]."""

STAIRS = 4
EXPONENTIAL_RATE = 5.0


def constant(progress: float) -> float:
    """The last value from the start on."""
    return 1.0


def linear(progress: float) -> float:
    return progress


def cubic(progress: float) -> float:
    """Fast while there is much to prune, slow near the end (Zhu and Gupta, papers/1710.01878)."""
    return 1.0 - (1.0 - progress) ** 3


def cosine(progress: float) -> float:
    return (1.0 - math.cos(math.pi * progress)) / 2.0


def exponential(progress: float) -> float:
    """What is left of the way shrinks by the same factor each step: e**-5 of it at the end, then 0."""
    return math.expm1(-EXPONENTIAL_RATE * progress) / math.expm1(-EXPONENTIAL_RATE)


def step(progress: float) -> float:
    """Four equal stairs, the last one reached at the end."""
    return math.floor(STAIRS * progress) / STAIRS


SHAPES: dict[str, Shape] = {
    shape.__name__: shape for shape in (constant, linear, cubic, cosine, exponential, step)
}


def name_of(shape: str | Shape) -> str:
    """A readable name: of a function its own, of a `functools.partial` with its arguments, of any other
    callable that of its class."""
    if isinstance(shape, str):
        return shape
    if isinstance(shape, partial):
        settings = [repr(value) for value in shape.args]
        settings += [f"{key}={value!r}" for key, value in shape.keywords.items()]
        return f"{name_of(shape.func)}({', '.join(settings)})"
    if inspect.isroutine(shape):
        return shape.__name__
    return type(shape).__name__


def as_step(when: int | float, max_steps: int) -> int:
    """Optimizer step of `when`: an int is a step, a float in [0, 1] a fraction of `max_steps`."""
    return round(when * max_steps) if isinstance(when, float) else when


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """From `initial` at step `start` to `final` at step `end`, along `shape`, and constant outside.

    `start` and `end` are optimizer steps (int) or fractions of the training (float in [0, 1]).
    `shape` is one of `SHAPES` by name, or a function of progress that stays in [0, 1] and ends at 1. It
    may fall on the way.

    Raises ValueError for an unknown shape, a function that breaks its promise, or times that are
    negative, not finite or (both of one kind) in the wrong order.
    """

    final: float
    initial: float = 0.0
    shape: str | Shape = "cubic"
    start: int | float = 0.0
    end: int | float = 1.0

    def __post_init__(self) -> None:
        if not callable(self.shape) and not (isinstance(self.shape, str) and self.shape in SHAPES):
            raise ValueError(
                f"`schedule` is {self.shape!r}; allowed are {sorted(SHAPES)} or a function of "
                "progress in [0, 1]."
            )
        for name, when in (("start", self.start), ("end", self.end)):
            check_time(name, when)
        if type(self.start) is type(self.end) and self.start > self.end:
            raise ValueError(f"`start` ({self.start}) is after `end` ({self.end}): swap them.")
        if callable(self.shape):
            _check_shape(self.shape)

    def span(self, max_steps: int) -> tuple[int, int]:
        """First and last step of the change, in optimizer steps of a training of `max_steps`.

        The last step is at least 1: nothing has been learned before the first one.
        Raises ValueError when the change could not finish within the training.
        """
        start, end = as_step(self.start, max_steps), max(as_step(self.end, max_steps), 1)
        if end > max_steps:
            raise ValueError(
                f"the schedule ends at step {end}, but training ends at step {max_steps}: the "
                f"target would not be reached. Train longer, or pass `end` <= {max_steps} or a "
                "fraction such as `end=0.6`."
            )
        if start > end:
            raise ValueError(
                f"the schedule starts at step {start}, after its end at step {end} of {max_steps}: "
                "pass an earlier `start` or a later `end`."
            )
        return start, end

    def value(self, step: int, max_steps: int) -> float:
        """The value after `step` optimizer steps of `max_steps`."""
        start, end = self.span(max_steps)
        if step >= end:
            return self.final
        if step < start:
            return self.initial
        return self.along((step - start) / (end - start))

    def along(self, progress: float) -> float:
        """The value where `progress` in [0, 1] of the way is done, whenever that is."""
        if progress >= 1:
            return self.final
        shape = self.shape if callable(self.shape) else SHAPES[self.shape]
        return self.initial + (self.final - self.initial) * shape(progress)


@dataclass(frozen=True, kw_only=True)
class Drop:
    """An evaluation worse than the best one before it by more than `by`.

    metric: a name in the logs, as "eval_accuracy"; "eval_" may be left out.
    by: in the units of the metric, 0 or more.
    greater_is_better: None says what Trainer says, that all but losses are better when they rise.

    Raises ValueError for a metric without a name and a `by` that is negative.
    """

    metric: str
    by: float
    greater_is_better: bool | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.metric, str) or not self.metric:
            raise ValueError(
                f"`metric` is {self.metric!r}: pass its name in the logs, such as 'eval_accuracy'."
            )
        if not isinstance(self.by, int | float) or not self.by >= 0:
            raise ValueError(
                f"`by` is {self.by!r}: the drop that is accepted is 0 or more, in the units of the "
                "metric, such as 0.01."
            )

    @property
    def name(self) -> str:
        return self.metric if self.metric.startswith("eval_") else f"eval_{self.metric}"

    def happened(self, value: float, earlier: Sequence[float]) -> bool:
        """Whether `value` is a drop after the `earlier` values."""
        rising = self.greater_is_better
        if rising is None:
            rising = not self.name.endswith("loss")
        sign = 1 if rising else -1
        return any(sign * best - sign * value > self.by for best in earlier)


@dataclass(frozen=True, kw_only=True)
class Clock:
    """The time of a schedule that stands still after bad evaluations: `time` at optimizer step
    `since`, running from there on or not."""

    time: int = 0
    since: int = 0
    runs: bool = True

    def at(self, step: int) -> int:
        """The time at optimizer step `step`, not before `since`."""
        return self.time + (step - self.since if self.runs else 0)


def clock_of(history: Sequence[Mapping[str, float]], *, hold: Drop | None, back: Drop | None) -> Clock:
    """The clock after the evaluations in `history`, rows of logs with their "step".

    After a drop of `hold` the time stands still until an evaluation without one. A drop of `back`
    also returns it to the time of the last evaluation that was no drop. A pure function of the logs,
    which every checkpoint of a Trainer holds.
    """
    clock, good = Clock(), 0
    seen: dict[Drop, list[float]] = {drop: [] for drop in (hold, back) if drop is not None}
    for row in history:
        values = {drop: row[drop.name] for drop in seen if drop.name in row}
        if not values:
            continue
        fallen = {drop for drop, value in values.items() if drop.happened(value, seen[drop])}
        for drop, value in values.items():
            seen[drop].append(value)
        step = int(row["step"])
        time = clock.at(step)
        if not fallen:
            good = time
        clock = Clock(time=good if back in fallen else time, since=step, runs=not fallen)
    return clock


def check_time(name: str, when: int | float) -> None:
    """Raises ValueError where `when` is neither a step nor a fraction of the training."""
    if isinstance(when, bool) or not isinstance(when, (int, float)):
        raise ValueError(f"`{name}` is {when!r}: pass a step (int) or a fraction (float in [0, 1]).")
    if isinstance(when, float) and not 0.0 <= when <= 1.0:
        raise ValueError(
            f"`{name}` is {when}: a float is a fraction of the training and lies in [0, 1]; pass "
            "an int for a step."
        )
    if when < 0:
        raise ValueError(f"`{name}` is {when}: steps count from 0.")


def check_interval(interval: int) -> None:
    """Raises ValueError where `interval` is no number of steps."""
    if isinstance(interval, bool) or not isinstance(interval, int) or interval < 1:
        raise ValueError(f"`interval` is {interval!r}: pass a number of steps, 1 or more.")


def _check_shape(shape: Shape) -> None:
    values = [shape(i / 100) for i in range(101)]
    outside = [value for value in values if not 0.0 <= value <= 1.0]
    if outside or values[-1] != 1.0:
        raise ValueError(
            f"the schedule function gave {outside[0] if outside else values[-1]}: it must stay in "
            "[0, 1] and end at 1."
        )
