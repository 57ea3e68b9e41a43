"""Two processes share the asking, and train as one."""

import json
from pathlib import Path

import pytest
import torch
from distillation.cache.ranks import ROWS, run
from distributed.accelerated import accelerate_launch


def test_two_processes_share_the_asking_and_train_as_one(tmp_path):
    accelerate_launch(Path(__file__).with_name("ranks.py"), str(tmp_path))
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
