"""The sparsity constraint: a mask over a group of weights, re-ranked along a schedule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_compress.distributed import count_in_earlier_shards, local
from hf_compress.member import Member
from hf_compress.pruning.input_squares import InputSquares
from hf_compress.pruning.masks import ZeroKeeper, sparsity_of
from hf_compress.pruning.patterns import Pattern
from hf_compress.pruning.ranking import Contest, Formula, Scope, check_scope, contests
from hf_compress.pruning.scores import Noise, Score, find_score
from hf_compress.pruning.select import Inputs, count_kept
from hf_compress.schedules import Schedule, Shape, check_interval
from hf_compress.targets import Target

INTERVAL = 10
# Below any score, and far enough from -inf that a block of such weights has a finite sum.
LOWEST = -1e30


class Pruner(ZeroKeeper):
    """Pruning of a group of weights, to be attached by `constrain`.

    sparsity: fraction in [0, 1) of the group's weights that are zero in the end, exactly; with larger
        patterns the fewest of their parts that reach it. An N:M pattern says it itself: 1 - N / M.
    score: a name, see `hf_compress.pruning.scores`, or a `Score`.
    pattern: "unstructured", "row" (whole output features, zeroed but not removed), "N:M" along the
        input dimension, or "RxC" blocks of R output and C input features; "1x4" is four neighbours
        along the input.
    scope: "global" ranks the group as one (rows: with those of equal length), "layer" prunes each
        weight to the same sparsity, "row" each output feature. N:M groups always compete alone.
    schedule, start, end: see `hf_compress.schedules.Schedule`.
    interval: optimizer steps between two rankings; by default 10, less where the schedule is so short
        that it would have fewer than ten of them.
    decay: of the moving averages in the score, in [0, 1).
    min_keep: fraction in [0, 1] of each weight that a global ranking leaves in any case.
    targets: where the input dimension of each weight lies, as `find_targets` tells; needed by
        patterns, by scope "row" and by scores of inputs.
    inputs: of the model's layers; needed by scores that see them ("wanda").

    Zeros that are there at the start count as pruned, and the sparsity never falls below theirs.
    The gradient of a pruned weight is masked, so its latent value waits, but for what momentum and
    weight decay still do to it, and can come back when the ranking changes; once the schedule has ended
    the mask is fixed. The gradient norm that a Trainer clips counts pruned weights too.

    Memory for each weight: a bool mask; until the schedule ends also a latent copy and, for scores
    with a statistic, that statistic. A ranking by a pattern or by row takes the scores of one weight.

    In a loop of your own, tell it the time before each step: `pruner.at(step, max_steps)`, with the
    number of optimizer steps taken when this one is done.

    Raises ValueError for settings out of range, when it is attached for weights that the pattern does
    not divide, of which nothing would stay or whose groups FSDP2 shards cut, and at a ranking for
    scores that are not finite.
    """

    def __init__(
        self,
        sparsity: float | None = None,
        *,
        score: str | Score = "obd",
        pattern: str = "unstructured",
        scope: Scope = "global",
        schedule: str | Shape = "cubic",
        start: int | float = 0.0,
        end: int | float = 0.6,
        interval: int | None = None,
        decay: float = 0.9,
        min_keep: float = 0.01,
        targets: Mapping[str, Target] | None = None,
        inputs: InputSquares | None = None,
    ) -> None:
        super().__init__()
        self.pattern = Pattern.parse(pattern)
        check_scope(scope, self.pattern)
        if interval is not None:
            check_interval(interval)
        if not isinstance(decay, int | float) or not 0.0 <= decay < 1.0:
            raise ValueError(f"`decay` is {decay!r}: it lies in [0, 1), such as 0.9.")
        if not isinstance(min_keep, int | float) or not 0.0 <= min_keep <= 1.0:
            raise ValueError(f"`min_keep` is {min_keep!r}: it is a fraction in [0, 1], such as 0.01.")
        sparsity = sparsity_of(self.pattern, sparsity)
        self.schedule = Schedule(final=sparsity, shape=schedule, start=start, end=end)
        self.score = find_score(score)
        self.scope = scope
        self.interval = interval
        self.decay = decay
        self.min_keep = min_keep
        self._targets = targets
        self._inputs = inputs
        self._updated = 0
        self._finished = False
        self._contests: list[Contest] = []
        self._floors: list[int] = []

    def at(self, step: int, max_steps: int) -> None:
        """The coming optimizer step is number `step` (from 1) of `max_steps`. A number that stays or
        falls holds the schedule, or takes it back."""
        super().at(step, max_steps)
        if self._inputs is not None:
            self._inputs.close()

    @property
    def finished(self) -> bool:
        """Whether the schedule has ended and its target was reached: the mask is fixed."""
        return self._finished

    @property
    def begun(self) -> bool:
        return self.schedule.value(self._step, self._max_steps) > 0.0

    @property
    def due(self) -> int:
        return sum(self._due_at(self.schedule.final))

    def fractions(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, float]:
        contests(parameters, self.pattern, self.scope, self._targets)  # refuses what cannot be divided
        return dict.fromkeys(parameters, self.schedule.final)

    @property
    def needs_latent(self) -> bool:
        return not self._finished

    def begin(self, members: Sequence[Member]) -> None:
        if self.score.sees == "inputs":
            self._check_inputs(members)
        self._contests = contests(
            {member.name: member.param.detach() for member in members},
            self.pattern,
            self.scope,
            self._targets,
        )
        super().begin(members)
        # What was zero at the start is zero in the latent weight too, so a resumed run knows it.
        trained = {member.name: count_kept(member.latent != 0) for member in members}
        self._floors = [c.size - sum(trained[n] for n in c.weights) for c in self._contests]
        self._check_something_stays()
        self._updated = self._step
        self._freeze_if_finished(members)
        if self.score.accumulate is not None and not self._finished:
            for member in members:
                if "statistic" not in member:
                    member["statistic"] = torch.zeros_like(member.param)

    def observe(self, members: Sequence[Member]) -> None:
        accumulate = None if self._finished else self.score.accumulate
        if accumulate is not None:
            squares = None
            if self.score.sees == "inputs" and self._inputs is not None:
                squares = self._inputs.means()
            for member in members:
                seen = cast(Tensor, member.param.grad) if squares is None else squares[member.name]
                accumulate(local(member["statistic"]), local(member.latent), local(seen), self.decay)
                # At once, while its gradient is in the cache.
                super().observe([member])
        else:
            super().observe(members)

    def update(self, members: Sequence[Member]) -> None:
        self._check_time()
        moved, self._updated = self._step != self._updated, self._step
        due = self._due_at(self.schedule.value(self._last_ranking(), self._max_steps))
        # Not only at the ranking steps: an fp16 overflow may have skipped one.
        ranking = moved and self._step == self._last_ranking()
        if not self._finished and (ranking or self.pruned != sum(due)):
            self._rank({member.name: member for member in members}, due)
            self.pruned = sum(due)
            self._freeze_if_finished(members)

    def _check_inputs(self, members: Sequence[Member]) -> None:
        if self._inputs is None:
            raise ValueError(
                f"score {self.score.name!r} sees the inputs of the layers: pass "
                "`inputs=InputSquares(model, targets)`."
            )
        targets = self._targets or {}
        for member in members:
            conv1d = member.name in targets and targets[member.name].input_dim == 0
            if isinstance(member.param, DTensor) and conv1d:
                raise ValueError(
                    f"the shards of {member.name} hold parts of its input features, which score "
                    f"{self.score.name!r} cannot tell apart: use DDP, or a score of gradients."
                )

    def _check_something_stays(self) -> None:
        final = self.schedule.final
        for contest, floor, due in zip(self._contests, self._floors, self._due_at(final), strict=True):
            if floor < contest.size == due:
                raise ValueError(
                    f"`sparsity` {final:.6g} leaves nothing of {next(iter(contest.weights))}, where "
                    f"{contest.size // contest.volume} parts compete: ask for less, leave it out by "
                    "`ignore`, or take a wider `scope`."
                )

    def _due_at(self, sparsity: float) -> list[int]:
        """How many weights of each contest are to be pruned."""
        return [
            contest.due(sparsity, final=self.schedule.final, floor=floor)
            for contest, floor in zip(self._contests, self._floors, strict=True)
        ]

    def _last_ranking(self) -> int:
        """The latest step up to now at which a ranking is due."""
        start, end = self.schedule.span(self._max_steps)
        interval = self.interval or min(INTERVAL, max((end - start) // 10, 1))
        if self._step >= end:
            return end
        return self._step - max(self._step - start, 0) % interval

    def _rank(self, members: Mapping[str, Member], due: Sequence[int]) -> None:
        # The parameter holds the latent weight here.
        for contest, floor, pruned in zip(self._contests, self._floors, due, strict=True):
            inputs = [self._score_inputs(members[name]) for name in contest.weights]
            formula = _zeros_last(self.score.formula) if floor else self.score.formula
            masks = contest.rank(formula, inputs, pruned, at_least=self.min_keep)
            for name, mask in zip(contest.weights, masks, strict=True):
                members[name]["mask"] = mask

    def _score_inputs(self, member: Member) -> Inputs:
        weight = member.param.detach()
        if self.score.noise is not None:
            first = count_in_earlier_shards(local(weight).numel(), weight)
            return weight, Noise(self.score.noise, member.name, first, weight.device)
        return (weight, member["statistic"]) if "statistic" in member else (weight,)

    def _freeze_if_finished(self, members: Sequence[Member]) -> None:
        if self._max_steps == 0:  # nobody has told the time yet
            return
        _, end = self.schedule.span(self._max_steps)
        self._finished = self._step >= end and self.pruned == self.due
        if self._finished:
            for member in members:
                if "statistic" in member:
                    del member["statistic"]


def _zeros_last(formula: Formula) -> Formula:
    """`formula` with zero weights ranked below all others, whatever their statistic says."""

    def ranked(weight: Tensor, *statistic: Tensor) -> Tensor:
        return formula(weight, *statistic).masked_fill_(weight == 0, LOWEST)

    return ranked
