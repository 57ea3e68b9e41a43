import functools
import math

import pytest

from hf_compress.schedules import SHAPES, Schedule, cubic, name_of


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_reaches_its_final_value_exactly_and_never_falls(shape):
    schedule = Schedule(final=0.83, initial=0.1, shape=shape, start=7, end=91)
    values = [schedule.value(step, 100) for step in range(101)]
    assert values[:7] == [0.1] * 7
    assert values[91:] == [0.83] * 10
    assert all(a <= b + 1e-12 for a, b in zip(values, values[1:], strict=False))


@pytest.mark.parametrize(
    ("shape", "half"),
    [
        ("constant", 1.0),
        ("linear", 0.5),
        ("cubic", 0.875),
        ("cosine", 0.5),
        ("step", 0.5),
        ("exponential", (1 - math.exp(-2.5)) / (1 - math.exp(-5))),
    ],
)
def test_halfway_by_hand(shape, half):
    assert Schedule(final=1.0, shape=shape).value(50, 100) == pytest.approx(half)


def test_fractions_and_steps_mean_the_same():
    by_fraction = Schedule(final=0.5, start=0.1, end=0.6)
    by_step = Schedule(final=0.5, start=20, end=120)
    assert [by_fraction.value(i, 200) for i in range(201)] == [
        by_step.value(i, 200) for i in range(201)
    ]


def test_own_function():
    assert Schedule(final=1.0, shape=lambda p: p**2).value(5, 10) == 0.25


def test_a_very_short_training_still_reaches_the_target():
    assert Schedule(final=0.5, end=0.3).value(1, 1) == 0.5


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"shape": "quadratic"}, "quadratic.*allowed"),
        ({"shape": lambda p: 1 - p}, r"gave 0\.0.*end at 1"),
        ({"shape": lambda p: p / 2}, r"gave 0\.5.*end at 1"),
        ({"shape": lambda p: 2 * p if p < 1 else 1.0}, r"gave 1\.02.*stay in"),
        ({"start": 0.8, "end": 0.2}, "after"),
        ({"start": 80, "end": 20}, "after"),
        ({"start": -1}, "count from 0"),
        ({"end": 1.5}, "fraction"),
        ({"end": float("nan")}, "fraction"),
        ({"end": True}, "step"),
        ({"end": "0.5"}, "step"),
    ],
)
def test_refusals(wrong, message):
    with pytest.raises(ValueError, match=message):
        Schedule(final=0.5, **wrong)


@pytest.mark.parametrize(("start", "end"), [(0.0, 101), (0.9, 50)])
def test_a_schedule_that_cannot_finish_is_refused(start, end):
    with pytest.raises(ValueError, match="step"):
        Schedule(final=0.5, start=start, end=end).span(100)


def power(progress, exponent):
    return progress**exponent


class Slow:
    def __call__(self, progress):
        return progress**4


@pytest.mark.parametrize(
    ("shape", "name"),
    [
        ("linear", "linear"),
        (cubic, "cubic"),
        (functools.partial(power, exponent=2), "power(exponent=2)"),
        (Slow(), "Slow"),
        (lambda p: p, "<lambda>"),
    ],
)
def test_shapes_have_readable_names(shape, name):
    assert name_of(shape) == name
    Schedule(final=1.0, shape=shape)
