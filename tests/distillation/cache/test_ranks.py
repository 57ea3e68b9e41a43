"""Two processes share the asking, and train as one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands import accelerate_cli
from distillation.cache.ranks import ROWS, run

LAUNCH = (
    "launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no "
    "--dynamo_backend no --main_process_port 0"
)


def test_two_processes_share_the_asking_and_train_as_one(tmp_path):
    script = Path(__file__).with_name("ranks.py")
    command = [sys.executable, accelerate_cli.__file__, *LAUNCH.split(), str(script), str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]

    expected = run(tmp_path / "one", 8, 1)
    assert expected["asked"] == ROWS
    # Of three files the first process writes two.
    assert [rank["asked"] for rank in ranks] == [8, 4]
    assert all(rank["keys"] == expected["keys"] for rank in ranks)
    # The rows left for the second step are too few for two batches of 4: accelerate repeats some.
    ours, theirs = torch.tensor(ranks[0]["losses"][:1]), torch.tensor(expected["losses"][:1])
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert ranks[0]["eval"] == pytest.approx(expected["eval"], rel=1e-5)
