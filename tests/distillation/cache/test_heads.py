"""For every head: trained from the cache as with the teacher beside it."""

import pytest
import torch
from distillation.cache.pairs import CASES, LANGUAGE, cached, losses, pair, rows_of, trainer_of


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


@pytest.mark.parametrize("case", LANGUAGE)
@pytest.mark.parametrize("what", ["sampled", "topk"])
def test_of_a_shortlist_the_loss_is_that_of_the_lists_of_single_rows(case, what, tmp_path):
    """Against each row alone, whose teacher answers whole: the bound of topk, the mean of sampled."""
    student, teacher = pair(case)
    rows = cached(case, tmp_path, what=what, size=95, dtype=torch.float32)
    trainer = trainer_of(student, "cached", rows, tmp_path)
    measured = trainer.evaluate(rows)
    online = trainer_of(student, teacher, rows_of(case), tmp_path)
    expected = online.evaluate(rows_of(case))
    # Of 96 classes one is left out, which topk lumps with none.
    tolerance = 1e-5 if what == "topk" else 2e-2
    for name in ("eval_loss_kd", "eval_loss_task", "eval_agreement"):
        assert measured[name] == pytest.approx(expected[name], rel=tolerance), name
