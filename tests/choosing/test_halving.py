import itertools
import random

import pytest

from hf_compress.choosing.halving import Rung, nondominated, ranked, rungs


def test_each_rung_is_three_times_as_long_with_a_third_of_the_candidates():
    assert rungs(36, 2700) == [Rung(100, 12), Rung(300, 4), Rung(900, 3)]
    assert rungs(9, 900) == [Rung(300, 3)]
    assert rungs(3, 900) == []
    assert rungs(4, 900) == []  # four thirds of a training, to save one
    assert rungs(16, 400, finalists=1, factor=4) == [Rung(25, 4), Rung(100, 1)]


def test_a_short_training_has_fewer_rungs_but_never_too_short_ones():
    assert rungs(36, 90) == [Rung(10, 12), Rung(30, 3)]
    assert rungs(36, 12) == [Rung(4, 3)]


@pytest.mark.parametrize("steps", [30, 100, 1000, 12345])
@pytest.mark.parametrize("candidates", [4, 10, 47, 300])
@pytest.mark.parametrize("finalists", [1, 3])
def test_halving_costs_less_than_training_all(candidates, steps, finalists):
    found = rungs(candidates, steps, finalists=finalists)
    alive, spent = candidates, 0
    for rung in found:
        assert rung.steps < steps
        spent, alive = spent + alive * rung.steps, rung.keep
    assert alive == (finalists if found else candidates)
    assert spent + alive * steps <= candidates * steps


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((0, 100), "`candidates` must be at least 1, got 0"),
        ((9, 0), "`steps` must be at least 1"),
        ((9, 100, {"finalists": 0}), "`finalists` must be at least 1"),
        ((9, 100, {"factor": 1}), "`factor` must be at least 2"),
    ],
)
def test_refusals(given, message):
    *numbers, settings = given if len(given) == 3 else (*given, {})
    with pytest.raises(ValueError, match=message):
        rungs(*numbers, **settings)


def test_without_a_limit_on_the_score_the_best_go_on():
    assert ranked("abcd", [0.5, 0.9, 0.9, 0.1], [1, 3, 2, 1]) == ["c", "b", "a", "d"]


def test_what_is_larger_than_one_that_is_good_enough_is_stopped_first():
    # By cost: tiny (hopeless), small (nearly), middle (enough), large (more than enough), huge (best).
    names = ["tiny", "small", "middle", "large", "huge"]
    scores, costs = [0.2, 0.78, 0.81, 0.85, 0.9], [1, 2, 3, 4, 5]
    order = ranked(names, scores, costs, enough=0.8)
    assert order == ["middle", "small", "tiny", "large", "huge"]
    # Where none is good enough yet, the nearest come first, and what is dominated goes last.
    assert ranked(names, [0.2, 0.4, 0.3, 0.5, 0.6], costs, enough=0.8) == [
        *("huge", "large", "small", "tiny"),
        "middle",
    ]


def test_a_front_is_what_no_point_beats():
    generator = random.Random(0)
    points = [(generator.randint(0, 9), generator.randint(0, 9)) for _ in range(60)]
    found = {points[place] for place in nondominated(points)}
    for point, other in itertools.product(points, points):
        if other != point and other[0] <= point[0] and other[1] <= point[1]:
            assert point not in found
    kept = [points[place] for place in nondominated(points)]
    assert len(kept) == len(set(kept))
    beaten = set(points) - found
    assert all(any(f[0] <= p[0] and f[1] <= p[1] for f in found) for p in beaten)
