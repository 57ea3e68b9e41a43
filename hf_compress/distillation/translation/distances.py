"""Distances between models whose tokens are others."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_compress.distillation.divergences import Divergence
from hf_compress.distillation.losses import precise


def likelihoods(logits: Tensor, tokens: Tensor, spans: Tensor, count: int) -> Tensor:
    """The logarithm of the probability of each span, the product of those of its tokens.

    logits: (items, classes), already divided by a temperature; tokens: (items,), the tokens that came;
    spans: (items,), their spans in [0, count). Returns (count,) in fp32 or better, 0 for one without
    tokens.
    """
    logits = precise(logits)
    each = logits.gather(-1, tokens[:, None])[:, 0] - logits.logsumexp(-1)
    return each.new_zeros(count).index_add(0, spans, each)


def between_likelihoods(divergence: Divergence, student: Tensor, teacher: Tensor) -> Tensor:
    """Whether the text comes or not, as a distribution over these two (papers/2503.20083).

    student, teacher: (...) logarithms of probabilities of the same spans, softened already. Returns
    (...). Raises ValueError for a divergence of logits.
    """
    return divergence.between_distributions(_whether(student), _whether(teacher))


def sorted_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """The sum of |student - teacher| over probabilities sorted from the largest, whatever they are of
    (papers/2402.12030): the transport between the two where every move costs the same. In [0, 2].

    student: (items, classes), teacher: (items, other classes), logarithms of probabilities; the shorter
    is filled up with zeros. Returns (items,).
    """
    ours, theirs = (logs.exp().sort(-1, descending=True).values for logs in (student, teacher))
    classes = max(ours.shape[-1], theirs.shape[-1])
    ours, theirs = (F.pad(each, (0, classes - each.shape[-1])) for each in (ours, theirs))
    return (ours - theirs).abs().sum(-1)


def _whether(logs: Tensor) -> Tensor:
    # At probability 1 the logarithm of the rest has no gradient.
    logs = logs.clamp(max=-torch.finfo(logs.dtype).eps)
    return torch.stack([logs, torch.log(-torch.expm1(logs))], dim=-1)
