"""Calibration data: a few batches of what a model is meant for, run through it without training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

Batch = Mapping[str, Tensor]


def check_calibration(calibration: Iterable[Batch]) -> list[Batch]:
    """The batches as a list.

    Raises TypeError for what is no iterable of mappings of tensors, ValueError where it is empty or
    holds NaN, batches without rows, or batches of nothing but padding.
    """
    if isinstance(calibration, (str, Mapping)) or not isinstance(calibration, Iterable):
        raise TypeError(
            f"`calibration` is a {type(calibration).__name__}: pass several batches, such as a list of "
            "dicts of tensors, or a DataLoader."
        )
    batches = list(calibration)
    if not batches:
        raise ValueError(
            "`calibration` is empty: pass batches of what the model is meant for, some 32 rows. A "
            "generator gives its batches only once."
        )
    for index, batch in enumerate(batches):
        _check_batch(index, batch)
    return batches


def _check_batch(index: int, batch: Batch) -> None:
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"calibration batch {index} is a {type(batch).__name__}, no mapping of tensors: collate "
            "the rows, for example with a DataLoader and a data collator."
        )
    if not batch:
        raise ValueError(
            f"calibration batch {index} is empty: give tensors by the names of the model's inputs, "
            "such as `input_ids`."
        )
    for key, value in batch.items():
        if not isinstance(value, Tensor):
            raise TypeError(
                f"`{key}` of calibration batch {index} is a {type(value).__name__}, so the batch is no "
                "mapping of tensors: collate the rows, for example with a DataLoader and a data "
                "collator."
            )
        if value.numel() == 0:
            raise ValueError(
                f"`{key}` of calibration batch {index} has shape {tuple(value.shape)}: leave out rows "
                "without anything in them, and batches without rows."
            )
        if value.isnan().any():
            raise ValueError(
                f"`{key}` of calibration batch {index} holds NaN: leave its row out, or mend what "
                "prepares it."
            )
        if key.endswith("attention_mask") and value.dim() == 2 and not value.any():
            raise ValueError(
                f"calibration batch {index} is nothing but padding, says its `{key}`: it is 1 where a "
                "token counts. Leave such batches out."
            )


def padding_mask(batch: Batch, key: str) -> Tensor | None:
    """Bool (rows, positions), False at padding; None where the batch has no mask or no padding."""
    mask = batch.get(key)
    if mask is None or mask.dim() != 2 or bool(mask.all()):
        return None
    return mask.bool()
