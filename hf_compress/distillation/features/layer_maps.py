"""Which layer of the student is compared with which of the teacher."""

from __future__ import annotations

from collections.abc import Sequence

Pairs = list[tuple[int, int]]
"""(student's layer, teacher's layer), both from 0."""


def layer_pairs(layers: str | Sequence[tuple[int, int]], student: int, teacher: int) -> Pairs:
    """The pairs that `layers` names, in a student of `student` and a teacher of `teacher` layers.

    "uniform": each of the student with the teacher's at the same fraction of the depth, the last with
        the last (papers/1909.10351).
    "skip": each but the last with every (teacher / student)-th (PKD-Skip, papers/1908.09355).
    "last": each but the last with the teacher's last ones (PKD-Last, papers/1908.09355).
    "final": the last with the last.
    "closest": the teacher's of "uniform", for each of which the student's that is closest is chosen
        in training (papers/2204.00408); until there are measurements, as "uniform".

    Raises ValueError where the map does not fit both depths.
    """
    if not isinstance(layers, str):
        return _explicit(layers, student, teacher)
    if layers == "final":
        return [(student - 1, teacher - 1)]
    if student > teacher:
        raise ValueError(
            f"`layers` is {layers!r}, but the student has {student} layers and the teacher only "
            f"{teacher}: pass pairs of numbers."
        )
    if layers in ("uniform", "closest"):
        return [(i, round((i + 1) * teacher / student) - 1) for i in range(student)]
    if student == 1:
        raise ValueError(
            f"`layers` is {layers!r}, which leaves the last layer out, but the student has only one: "
            "pass 'final'."
        )
    if layers == "skip":
        if teacher % student:
            raise ValueError(
                f"`layers` is 'skip', but the student's {student} layers do not divide the teacher's "
                f"{teacher}: pass 'uniform' or pairs of numbers."
            )
        return [(i, (i + 1) * teacher // student - 1) for i in range(student - 1)]
    return [(i, teacher - student + i) for i in range(student - 1)]


def _explicit(layers: Sequence[tuple[int, int]], student: int, teacher: int) -> Pairs:
    pairs = []
    for pair in layers:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise ValueError(f"`layers` holds {pair!r}: pass pairs of numbers (student's, teacher's).")
        for who, number, depth in zip(("student", "teacher"), pair, (student, teacher), strict=True):
            if isinstance(number, bool) or not isinstance(number, int) or not -depth <= number < depth:
                raise ValueError(
                    f"`layers` holds {pair!r}, but the {who} has {depth} layers: 0 to {depth - 1}, or "
                    f"-1 to {-depth} from its end."
                )
        pairs.append((pair[0] % student, pair[1] % teacher))
    if not pairs:
        raise ValueError("`layers` is empty: pass at least one pair of numbers (student's, teacher's).")
    return pairs
