"""Match losses, gradients, projections and choices of layers do not depend on how a batch is cut."""

import json
from pathlib import Path

import pytest
from distillation.features.grid import CASES, run_cuts
from distributed.accelerated import accelerate_launch
from distributed.test_two_ranks import launch


@pytest.fixture(scope="module")
def one_process():
    return run_cuts([(8, 1), (2, 4)])


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    written = tmp_path_factory.mktemp("grid") / "results.json"
    accelerate_launch(Path(__file__).with_name("grid.py"), str(written))
    return json.loads(written.read_text())


@pytest.mark.parametrize("case", CASES)
def test_accumulation_changes_nothing(one_process, case):
    whole = one_process[case]["8x1"]
    assert all(min(step[name] for name in whole["names"]) > 1e-5 for step in whole["steps"])
    assert_same(one_process[case]["2x4"], whole)


@pytest.mark.parametrize("case", CASES)
def test_a_second_process_changes_nothing(one_process, two_processes, case):
    # The rows left for the second step are too few for two batches of 4: accelerate repeats some.
    cut, whole = two_processes[case]["4x1"], one_process[case]["8x1"]
    for ours, theirs in zip(cut["steps"][:1], whole["steps"][:1], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_a_second_process_with_accumulation_changes_nothing(one_process, two_processes, case):
    assert_same(two_processes[case]["2x2"], one_process[case]["8x1"])


def assert_same(measured, expected):
    """Both steps, of which the second is after an update and an incomplete window."""
    for ours, theirs in zip(measured["steps"], expected["steps"], strict=True):
        assert ours == pytest.approx(theirs, rel=2e-5)
    assert measured["projections"] == pytest.approx(expected["projections"], rel=1e-5)


def test_shards_change_nothing():
    launch("../distillation/features/shards.py")
