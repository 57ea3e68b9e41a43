"""Loss and gradient do not depend on how a batch is cut, where Trainer's own do."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands import accelerate_cli
from distillation.grid import CASES, run_cuts

LAUNCH = (
    "launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no "
    "--dynamo_backend no --main_process_port 0"
)


@pytest.fixture(scope="module")
def one_process():
    return run_cuts([(8, 1), (2, 4)])


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    written = tmp_path_factory.mktemp("grid") / "results.json"
    script = Path(__file__).with_name("grid.py")
    command = [sys.executable, accelerate_cli.__file__, *LAUNCH.split(), str(script), str(written)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
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
