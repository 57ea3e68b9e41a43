"""When the student writes what it is taught on, and from which random numbers."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hf_compress.distillation.sampling import check_writes, rewritten
from hf_compress.distillation.tasks.heads import Head


class OnPolicy:
    """rate: the part of the optimizer steps in which it does, in [0, 1]; temperature: of the tokens
    that it draws, 0 for the most probable ones.

    Both the steps and the texts are functions of the seed and the step, so that processes agree on the
    former and a resumed training writes the latter again; texts differ from process to process, and
    where a batch is cut in another way.
    """

    def __init__(self, rate: float, temperature: float, seed: int, process: int) -> None:
        self.rate = rate
        self._temperature = temperature
        self._seed = seed
        self._process = process

    def check(self, head: Head, *, answers_again: bool) -> None:
        """Raises NotImplementedError where it cannot be done, if it is asked for.

        answers_again: whether the teacher reads what it is given, in the student's tokens.
        """
        if not self.rate:
            return
        check_writes(head)
        if not answers_again:
            raise NotImplementedError(
                f"on_policy={self.rate} asks the teacher about text that is written in the training: "
                "not with teacher='cached' or `teacher_processing_class`."
            )

    def in_step(self, step: int) -> bool:
        """Whether optimizer step `step`, from 0, is one of them."""
        return random.Random(f"{self._seed} {step}").random() < self.rate

    def written(
        self, student: Any, batches: Sequence[Mapping[str, Any]], step: int
    ) -> list[dict[str, Any]]:
        """The batches of optimizer step `step` as `student` goes on with them; see `rewritten`. Random
        states stay as they are."""
        with torch.random.fork_rng():
            drawn = random.Random(f"{self._seed} {step} {self._process}")
            torch.manual_seed(drawn.getrandbits(63))
            return [rewritten(student, batch, temperature=self._temperature) for batch in batches]
