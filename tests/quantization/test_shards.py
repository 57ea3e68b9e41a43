from pathlib import Path

from distributed.test_two_ranks import launch


def test_shards_equal_one_process_bit_for_bit():
    launch(str(Path(__file__).with_name("shards.py")))
