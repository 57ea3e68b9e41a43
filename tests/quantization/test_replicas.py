"""Two ranks with half a batch each against one process with both halves."""

from pathlib import Path

import pytest
import torch
from distributed.test_two_ranks import launch
from quantization.replicas import METHODS, results
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    launch(str(Path(__file__).with_name("replicas.py")), str(folder))
    return folder


@pytest.fixture
def one_thread():
    """As each rank has: sums of more threads round otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.usefixtures("one_thread")
def test_data_parallel_training_equals_one_process_bit_for_bit(two_ranks, tmp_path, method):
    expected = results(tmp_path, method)
    assert sum("scale" in name for name in expected) == (26 if "fixed" in method else 13)
    for rank in (0, 1):
        found = load_file(two_ranks / f"{method} {rank}")
        assert found.keys() == expected.keys()
        astray = [name for name, value in expected.items() if not value.equal(found[name])]
        assert not astray
