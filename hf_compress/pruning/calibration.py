"""Calibration data: a few batches of what a model is meant for, run through it without training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

Batch = Mapping[str, Tensor]


def check_calibration(calibration: Iterable[Batch]) -> list[Batch]:
    """The batches as a list.

    Raises TypeError for what is no iterable of mappings of tensors, ValueError where it is empty or
    holds NaN.
    """
    if isinstance(calibration, (str, Mapping)) or not isinstance(calibration, Iterable):
        raise TypeError(
            f"`calibration` is a {type(calibration).__name__}: pass several batches, such as a list of "
            "dicts of tensors, or a DataLoader."
        )
    batches = list(calibration)
    if not batches:
        raise ValueError("`calibration` is empty: some 32 rows are enough.")
    for index, batch in enumerate(batches):
        if not isinstance(batch, Mapping) or not all(isinstance(v, Tensor) for v in batch.values()):
            raise TypeError(
                f"calibration batch {index} is no mapping of tensors: collate the rows, for example "
                "with a DataLoader and a data collator."
            )
        for key, value in batch.items():
            if value.isnan().any():
                raise ValueError(f"`{key}` of calibration batch {index} holds NaN.")
    return batches


def padding_mask(batch: Batch, key: str) -> Tensor | None:
    """Bool (rows, positions), False at padding; None where the batch has no mask or no padding."""
    mask = batch.get(key)
    if mask is None or mask.dim() != 2 or bool(mask.all()):
        return None
    return mask.bool()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation mode; afterwards each module is in the mode in which it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
