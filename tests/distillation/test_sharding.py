"""Students and teachers that FSDP2 cuts into shards."""

from distributed.test_two_ranks import launch


def test_shards_train_as_copies_do(tmp_path):
    launch("../distillation/fsdp_ranks.py", str(tmp_path))
