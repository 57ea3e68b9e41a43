"""A teacher's answers to items alone, in the place of its output."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hf_compress.distillation.shortlist import Shortlist


@dataclass(frozen=True)
class ItemAnswers:
    """values: (items, ...) logits or a shortlist of them, row by row; counts: (rows,), how many items
    each row has."""

    values: Tensor | Shortlist
    counts: Tensor

    def to_items(self, counted: Tensor, name: str) -> Tensor | Shortlist:
        """The answers to the rows of `counted`, bool (rows, ...): whether a label is an item.

        Raises ValueError where these are not as many.
        """
        expected = counted.flatten(1).sum(1)
        if self.counts[: len(expected)].tolist() != expected.tolist():
            raise ValueError(
                f"{name}: the teacher answered to {self.counts.tolist()} items in the rows of a batch "
                f"that has {expected.tolist()}. Collate as when it was asked, with padding on the "
                "right: on the left it makes an item of the first token of each row that is padded."
            )
        return self.values[: int(expected.sum())]
