"""Calibration data that cannot be right is told before the model runs."""

import pytest
import torch
from torch.utils.data import DataLoader

from hf_compress.calibration.batches import check_calibration, padding_mask

IDS = torch.ones(2, 4, dtype=torch.long)


@pytest.mark.parametrize(
    "calibration",
    [
        [{"input_ids": IDS}],
        ({"input_ids": IDS} for _ in range(3)),
        DataLoader([{"input_ids": row} for row in IDS], batch_size=1),
        [{"input_ids": IDS, "attention_mask": torch.tensor([[1, 0, 0, 0], [0, 0, 0, 0]])}],
        # An additive mask of zeros leaves nothing out.
        [{"input_ids": IDS, "attention_mask": torch.zeros(2, 1, 4, 4)}],
    ],
)
def test_batches_are_taken_from_anything_that_gives_them(calibration):
    batches = check_calibration(calibration)
    assert all(batch["input_ids"].eq(1).all() for batch in batches)


@pytest.mark.parametrize(
    ("calibration", "error", "message"),
    [
        ("text", TypeError, "is a str: pass several batches"),
        ({"input_ids": IDS}, TypeError, "is a dict: pass several batches"),
        (None, TypeError, "is a NoneType: pass several batches"),
        ([], ValueError, "`calibration` is empty.*some 32 rows"),
        (iter(()), ValueError, "A generator gives its batches only once"),
        (["text"], TypeError, "batch 0 is a str, no mapping of tensors: collate"),
        ([{"input_ids": IDS}, {"text": "oil"}], TypeError, "`text` of calibration batch 1 is a str"),
        ([{"input_ids": [[1, 2]]}], TypeError, "`input_ids` of calibration batch 0 is a list"),
        ([{}], ValueError, "batch 0 is empty: give tensors by the names of the model's inputs"),
        ([{"input_ids": IDS[:0]}], ValueError, r"batch 0 has shape \(0, 4\): leave out"),
        (
            [{"pixel_values": torch.tensor([[torch.nan]])}],
            ValueError,
            "batch 0 holds NaN: leave its row",
        ),
        (
            [{"input_ids": IDS, "attention_mask": torch.zeros(2, 4)}],
            ValueError,
            "batch 0 is nothing but padding, says its `attention_mask`: it is 1 where a token counts",
        ),
    ],
)
def test_wrong_calibration_is_refused(calibration, error, message):
    with pytest.raises(error, match=message):
        check_calibration(calibration)


def test_a_mask_without_padding_is_none():
    assert padding_mask({"attention_mask": torch.ones(2, 3)}, "attention_mask") is None
    assert padding_mask({}, "attention_mask") is None
    mask = torch.tensor([[1, 1, 0]])
    assert padding_mask({"attention_mask": mask}, "attention_mask").equal(mask.bool())
