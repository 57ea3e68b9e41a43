import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def launch(script, *arguments):
    """Run `script` on two gloo ranks; its output where it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"),
            *("--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"),
            *(str(HERE / "rank.py"), str(HERE / script), *arguments),
        ],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-6000:]
    return run.stdout


def test_pruning_on_shards_equals_one_process_bit_for_bit():
    launch("shards.py")


# That the ranks agree the last test tells of every method.
@pytest.mark.parametrize(
    "method",
    ["weights", *(pytest.param(method, marks=pytest.mark.slow) for method in ("units", "grids"))],
)
def test_data_parallel_ranks_write_the_same_file(tmp_path, method):
    launch("replicas.py", str(tmp_path), method)
    first, second, saved = (
        (tmp_path / name).read_bytes()
        for name in ("0.safetensors", "1.safetensors", "checkpoint-12/model.safetensors")
    )
    assert first == second == saved


def test_data_parallel_ranks_agree_for_every_method(tmp_path):
    launch("replicas.py", str(tmp_path), "rows")
