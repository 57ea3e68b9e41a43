import math

import pytest

from hf_compress.choosing.limits import BYTES, MILLISECONDS, Limits, Measured, parse_amount


@pytest.mark.parametrize(
    ("text", "units", "found"),
    [
        ("40MB", BYTES, 40e6),
        ("1.5 GiB", BYTES, 1.5 * 2**30),
        ("900kB", BYTES, 900e3),
        ("20ms", MILLISECONDS, 20.0),
        ("0.5s", MILLISECONDS, 500.0),
        (None, BYTES, None),
    ],
)
def test_amounts_have_units(text, units, found):
    assert parse_amount("max_size", text, units) == found


@pytest.mark.parametrize("text", ["40", "40mb", "40 apples", "MB", "4.0.0MB", "", "20ms", "-", "nanMB"])
def test_an_amount_without_a_known_unit_is_refused(text):
    with pytest.raises(ValueError, match="`max_size` is .* write a number and its unit, one of B, kB"):
        parse_amount("max_size", text, BYTES)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "no limit was given"),
        ({"drop": -1.0}, "`drop` is -1: pass points, 0 or more"),
        ({"size": 0.0}, "`size` is 0: pass a number above 0"),
        ({"speedup": -2.0}, "`speedup` is -2"),
        ({"latency": math.inf}, "`latency` is inf"),
        ({"memory": math.nan}, "`memory` is nan"),
    ],
)
def test_limits_that_nobody_can_mean_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        Limits(**given)


def test_excess_is_a_fraction_of_each_limit():
    measured = Measured(bytes=50, latency_ms=8.0, speedup=2.0, memory=300)
    limits = Limits(drop=2.0, size=40, latency=10, speedup=3, memory=200)
    assert limits.excess(measured, drop=3.0) == pytest.approx(
        {"drop": 0.5, "size": 0.25, "speedup": 0.5, "memory": 0.5}
    )
    # What was not measured is not judged.
    assert "drop" not in limits.excess(measured)
    assert Limits(memory=1).excess(Measured(bytes=1, latency_ms=1, speedup=1)) == {}


def test_exactly_at_a_limit_is_within_it():
    measured = Measured(bytes=40, latency_ms=10.0, speedup=3.0)
    assert Limits(drop=0, size=40, latency=10, speedup=3).excess(measured, drop=0.0) == {}
    assert Limits(drop=0).excess(measured, drop=0.5) == {"drop": 0.5}
