"""Loss and gradient do not depend on how a batch is cut, where Trainer's own do."""

import json
from pathlib import Path

import pytest
from distillation.grid import CASES, run_cuts
from distributed.accelerated import accelerate_launch


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
    assert_same(one_process[case]["2x4"], one_process[case]["8x1"])


@pytest.mark.parametrize("case", CASES)
def test_a_second_process_changes_nothing(one_process, two_processes, case):
    # The rows left for the second step are too few for two batches of 4: accelerate repeats some.
    cut, whole = two_processes[case]["4x1"], one_process[case]["8x1"]
    assert_same({**cut, "steps": cut["steps"][:1]}, {**whole, "steps": whole["steps"][:1]})


@pytest.mark.parametrize("case", CASES)
def test_a_second_process_with_accumulation_changes_nothing(one_process, two_processes, case):
    assert_same(two_processes[case]["2x2"], one_process[case]["8x1"])


def assert_same(measured, expected):
    """Both steps, the second of them an incomplete window, and the evaluation with a ragged end."""
    for ours, theirs in zip(measured["steps"], expected["steps"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    assert measured["eval"] == pytest.approx(expected["eval"], rel=1e-5)
