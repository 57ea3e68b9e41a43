"""The spans of text that two tokenizers both cut at."""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate, groupby
from typing import NamedTuple

from hf_compress.distillation.translation.pieces import Pieces

NONE = -1
"""The span of a token that is in none."""


def common_spans(ours: Sequence[bytes], theirs: Sequence[bytes]) -> tuple[list[int], list[int]]:
    """The number of the span, from 0, of each token of two sequences, as short as they can be: a span
    ends where a token of both does.

    ours, theirs: what the tokens stand for. Spaces before the text count for nothing, since some
    tokenizers put one there. Where the texts become different, spans end: tokens behind that are in
    none (-1).
    """
    texts = [b"".join(each).lstrip(b" ") for each in (ours, theirs)]
    ends = [_ends(each) for each in (ours, theirs)]
    common = len(os.path.commonprefix(texts))
    cuts = sorted(end for end in {*ends[0]} & {*ends[1]} if 0 < end <= common)
    mine, other = ([_span(end, cuts) for end in each] for each in ends)
    return mine, other


def _ends(pieces: Sequence[bytes]) -> list[int]:
    whole = b"".join(pieces)
    spaces = len(whole) - len(whole.lstrip(b" "))
    return [max(end - spaces, 0) for end in accumulate(map(len, pieces))]


def _span(end: int, cuts: Sequence[int]) -> int:
    found = bisect_left(cuts, end)
    return found if found < len(cuts) else NONE


class Translation(NamedTuple):
    """One row in tokens of the teacher.

    ids: (their tokens,); spans: of those; our_spans: (our tokens,). The same number in both is the same
    text, and each span is a run of tokens.
    """

    ids: list[int]
    spans: list[int]
    our_spans: list[int]


def translate(ids: Sequence[int], ours: Pieces, theirs: Pieces) -> Translation:
    """The text of `ids`, without padding, in tokens of the teacher.

    A special token becomes the one of the same name or role (the beginning, the end), which is a span
    of its own; one that the teacher has not is left out. What the teacher's tokenizer puts before every
    text is put there too.
    """
    found = Translation([], [], [])
    spans = 0
    for special, run in groupby(ids, key=lambda number: number in ours.special):
        part = list(run)
        if special:
            for number in part:
                counterpart = theirs.counterpart(ours, number)
                found.our_spans.append(NONE if counterpart is None else spans)
                if counterpart is not None:
                    found.ids.append(counterpart)
                    found.spans.append(spans)
                    spans += 1
            continue
        pieces = ours.of(part)
        # A text cut short may end within a character.
        text = b"".join(pieces).decode("utf-8", errors="ignore")
        translated = theirs.encode(text)
        mine, other = common_spans(pieces, theirs.of(translated))
        found.ids.extend(translated)
        found.our_spans.extend(span if span == NONE else spans + span for span in mine)
        found.spans.extend(span if span == NONE else spans + span for span in other)
        spans += max(mine, default=NONE) + 1
    if theirs.begins_with is not None and found.ids[:1] != [theirs.begins_with]:
        found.ids.insert(0, theirs.begins_with)
        found.spans.insert(0, NONE)
    return found
