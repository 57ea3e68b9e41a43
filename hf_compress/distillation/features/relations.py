"""What one token costs whose attention, or whose relation to the other tokens, is compared."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_compress.distillation.features.attention import Attended, scores
from hf_compress.distillation.features.items import vectors
from hf_compress.distillation.losses import forward_kl, precise


def attention_costs(
    student: Attended, teacher: Attended, mask: Tensor | None, *, distance: str
) -> tuple[Tensor, float]:
    """Of each token the mean over the heads, (items,), and the weight of each (see `vectors`).

    "kl": KL(teacher's map || student's map) of its row (papers/2002.10957). "mse": of its scores
    before the softmax, the mean over the keys that it sees (papers/1909.10351).
    Raises ValueError where the numbers of heads differ.
    """
    (ours, seen), (theirs, seen_by_teacher) = scores(student), scores(teacher)
    theirs, seen = theirs.to(ours.device), seen & seen_by_teacher.to(seen.device)
    _check_heads("attention", ours.shape[1], theirs.shape[1])
    seen = seen.expand(ours.shape)
    (ours, weight), (theirs, _), (seen, _) = (
        vectors(part.transpose(1, 2), mask, "all") for part in (ours, theirs, seen)
    )
    return _costs(ours, theirs, seen, distance=distance), weight


def relation_costs(
    student: Attended, teacher: Attended, mask: Tensor | None, *, what: str, heads: int | None
) -> tuple[Tensor, float]:
    """Of each token the mean over the relation heads of KL(teacher || student) between the softmax of
    its products with all tokens, (items,), and the weight of each (papers/2012.15828).

    what: "queries", "keys" or "values", whose heads are put side by side and cut into `heads` of equal
    size, scaled by the root of that; None keeps the heads. Padding is no token.
    Raises ValueError where the numbers of heads differ, or `heads` do not divide the widths.
    """
    ours, theirs = (_relations(side, what, heads) for side in (student, teacher))
    theirs = theirs.to(ours.device)
    _check_heads(what, ours.shape[1], theirs.shape[1])
    seen = torch.ones_like(ours, dtype=torch.bool)
    if mask is not None:
        seen = mask[:, None, None].expand(ours.shape)
    (ours, weight), (theirs, _), (seen, _) = (
        vectors(part.transpose(1, 2), mask, "all") for part in (ours, theirs, seen)
    )
    return _costs(ours, theirs, seen, distance="kl"), weight


def _costs(student: Tensor, teacher: Tensor, seen: Tensor, *, distance: str) -> Tensor:
    """(items, heads, keys) -> (items,)."""
    student, teacher = precise(student), precise(teacher)
    if distance == "kl":
        student, teacher = (part.masked_fill(~seen, float("-inf")) for part in (student, teacher))
        return forward_kl(student.log_softmax(-1), teacher.log_softmax(-1)).mean(-1)
    # What is not seen may be anything, infinite too.
    squares = (student.masked_fill(~seen, 0.0) - teacher.masked_fill(~seen, 0.0)).square()
    return (squares.sum(-1) / seen.sum(-1).clamp(min=1)).mean(-1)


def _relations(attended: Attended, what: str, heads: int | None) -> Tensor:
    part = {"queries": attended.query, "keys": attended.key, "values": attended.value}[what]
    if heads is not None:
        joined = part.transpose(1, 2).flatten(2)
        if joined.shape[-1] % heads:
            raise ValueError(
                f"`relation_heads` is {heads}, which does not divide the width {joined.shape[-1]} of "
                f"the {what}: choose a divisor of it in both models."
            )
        part = joined.unflatten(-1, (heads, -1)).transpose(1, 2)
    return part @ part.transpose(-1, -2) / part.shape[-1] ** 0.5


def _check_heads(what: str, student: int, teacher: int) -> None:
    if student != teacher:
        raise ValueError(
            f"the student has {student} heads of {what}, the teacher {teacher}, so they cannot be "
            "compared one by one. Compare 'queries', 'keys' and 'values' with `relation_heads`, "
            "which cuts those of both anew."
        )
