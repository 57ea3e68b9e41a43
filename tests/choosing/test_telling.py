from dataclasses import replace

import pytest

from hf_compress.choosing.candidates import Candidate
from hf_compress.choosing.limits import Limits, Measured
from hf_compress.choosing.picture import draw_front
from hf_compress.choosing.search import Choice, Exported, Finished, Metric, Trained, Tried
from hf_compress.choosing.telling import front, sentence, table, to_dict


def measured(size, latency, speedup):
    return Measured(bytes=size, latency_ms=latency, speedup=speedup)


def choice():
    """The dense model and one finalist, each in one other runtime too."""
    training = Trained(steps=30, score=0.84, seconds=3.0)
    smaller = measured(20_000_000, 5.0, 2.0)
    finished = Finished(validation=0.84, test=0.83, measured=smaller, digest="a", training=training)
    dense = Finished(validation=0.85, test=0.84, measured=measured(80_000_000, 10.0, 1.0), digest="b")
    finalist = Tried(candidate=Candidate(layers=3), predicted=smaller, finished=finished)
    made = Choice(
        metric=Metric(name="accuracy"),
        limits=Limits(drop=2.0, size=40e6, speedup=1.5),
        prefer="size",
        steps=30,
        dense=dense,
        tried=[finalist],
        winner=finalist,
    )
    for name, found, validation in (
        ("dense", measured(21_000_000, 2.5, 4.0), 0.845),
        ("3layers", measured(6_000_000, 1.0, 10.0), 0.82),
    ):
        made.exported.append(
            Exported(
                name=name,
                runtime="openvino-int8",
                validation=validation,
                test=0.8,
                agreement=0.9,
                measured=found,
            )
        )
    return made


def test_what_was_exported_is_judged_by_the_same_limits():
    *_, dense, finalist = table(choice())
    assert dense == (
        *("dense, openvino-int8", "-", "0.8450", "0.8000", "21.00", "2.50", "4.00"),
        "within the limits",
    )
    assert finalist[-1] == "drop 3, at most 2"
    assert to_dict(choice())["exported"][1]["measured"]["speedup"] == 10.0


@pytest.mark.parametrize(
    ("prefer", "limits", "best"),
    [
        ("size", Limits(drop=4.0), "3layers in openvino-int8 is the smallest within"),
        ("size", Limits(drop=2.0), "dense in openvino-int8 is the smallest within"),
        ("latency", Limits(drop=4.0), "3layers in openvino-int8 is the fastest within"),
        ("score", Limits(size=40e6), "dense in openvino-int8 has the best validation accuracy within"),
    ],
)
def test_the_best_export_is_named_beside_the_winner(prefer, limits, best):
    told = sentence(replace(choice(), prefer=prefer, limits=limits))
    assert f"Of the 2 exports {best} the limits: validation accuracy 0.8" in told


def test_of_exports_of_one_size_the_better_is_named():
    made = choice()
    small = made.exported[1]
    better = replace(small, name="4bit", validation=0.84, measured=measured(6_000_100, 1.1, 9.0))
    told = sentence(replace(made, exported=[small, better], limits=Limits(drop=4.0)))
    assert "4bit in openvino-int8 is the smallest" in told


def test_no_export_is_named_where_none_is_within_the_limits():
    assert "exports" not in sentence(replace(choice(), limits=Limits(size=1e6)))
    assert "exports" not in sentence(replace(choice(), exported=[]))


def test_it_is_drawn(tmp_path):
    with_exports, without = choice(), choice()
    without.exported.clear()
    for number, each in enumerate((with_exports, without)):
        draw_front(each, tmp_path / f"{number}.png")
    pictures = [(tmp_path / f"{number}.png").read_bytes() for number in (0, 1)]
    assert pictures[0] != pictures[1]


def test_fast_is_what_is_fast_beside_the_dense_model():
    # The machine was slow when the second was timed, and the dense model in turn with it.
    made = choice()
    (first,) = made.tried
    for speedup, expected in ((4.0, ["3layers", "2layers"]), (1.9, ["3layers"])):
        other = replace(first.finished, measured=measured(30_000_000, 9.0, speedup))
        second = replace(first, candidate=Candidate(layers=2), finished=other)
        assert [each.name for each in front(replace(made, tried=[first, second]))] == expected
