"""Trained from the cache as with the teacher beside it."""

import pytest
import torch
from distillation.cache.pairs import CASES, cached, losses, pair, rows_of, trainer_of


@pytest.mark.parametrize("case", CASES)
def test_of_all_logits_the_training_is_the_one_with_the_teacher(case, tmp_path):
    """Shuffled, with rows of other batches than those in which the teacher was asked."""
    student, teacher = pair(case)
    online = losses(trainer_of(student, teacher, rows_of(case), tmp_path))
    student, _ = pair(case)
    rows = cached(case, tmp_path, what="logits")
    ours = losses(trainer_of(student, "cached", rows, tmp_path))
    torch.testing.assert_close(ours, online, rtol=1e-5, atol=1e-6)
    assert (online[:, 2] > 0).all()
