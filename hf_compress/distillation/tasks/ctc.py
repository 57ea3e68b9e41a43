"""Connectionist temporal classification: many frames of sound for a few letters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_compress.distillation.divergences import Divergence
from hf_compress.distillation.tasks.labelled import IGNORED
from hf_compress.distillation.tasks.task import Batch, Sums


@dataclass(frozen=True, kw_only=True)
class Ctc:
    """A `Task` whose items are rows, since only the loss of a whole row is known.

    A row costs its CTC loss, divided by the number of its letters where `per_letter`; its distillation
    and agreement are means over its real frames.

    lengths: number of samples (rows,) -> number of frames (rows,); blank: the class of no letter;
    zero_infinity: rows with more letters than frames cost nothing.
    """

    lengths: Callable[[Tensor], Tensor]
    blank: int
    per_letter: bool
    zero_infinity: bool
    name: str = "connectionist temporal classification"
    agreement: bool = True

    def count(self, batch: Batch) -> Tensor:
        return torch.tensor(len(batch["labels"]))

    def sums(
        self,
        student: Any,
        teachers: Sequence[Any],
        batch: Batch,
        *,
        divergence: Divergence,
        weights: Sequence[float] = (1.0,),
        rows: int | None = None,
    ) -> Sums:
        labels, ours = batch["labels"][:rows], student.logits[:rows]
        if not len(labels):
            nothing = ours.sum()
            return Sums(torch.zeros_like(nothing), nothing, nothing, torch.zeros_like(nothing))
        frames = self._frames(batch)[:rows].to(ours.device)
        real = torch.arange(ours.shape[1], device=ours.device) < frames[:, None]
        all_theirs = [self._of_teacher(each, ours)[real] for each in teachers]
        theirs_real = divergence.merged_classes(all_theirs, weights)
        # Letters behind the last of the teacher are padding of the vocabulary.
        ours_real = ours[real][:, : theirs_real.shape[-1]]
        share = 1 / frames[real.nonzero()[:, 0]]
        same = ours_real.argmax(-1) == theirs_real.argmax(-1)
        padded = ours.masked_fill(~real[..., None], 0.0)
        return Sums(
            items=torch.tensor(len(labels), device=ours.device),
            task=self._loss(padded, frames, labels.to(ours.device)).sum(),
            distillation=(share * divergence.between_classes(ours_real, theirs_real)).sum(),
            agreement=(share * same).sum(),
        )

    def _loss(self, logits: Tensor, frames: Tensor, labels: Tensor) -> Tensor:
        letters = (labels != IGNORED) & (labels != self.blank)
        lengths = letters.sum(-1)
        # Not implemented for half precision.
        log_probabilities = F.log_softmax(logits, dim=-1, dtype=torch.float32).transpose(0, 1)
        # cuDNN's is not deterministic, and refuses long rows.
        with torch.backends.cudnn.flags(enabled=False):
            losses = F.ctc_loss(
                log_probabilities,
                labels[letters],
                frames,
                lengths,
                blank=self.blank,
                reduction="none",
                zero_infinity=self.zero_infinity,
            )
        return losses / lengths.clamp(min=1) if self.per_letter else losses

    def _frames(self, batch: Batch) -> Tensor:
        if "attention_mask" in batch:
            samples = batch["attention_mask"].sum(-1)
        else:
            sound = batch["input_values"] if "input_values" in batch else batch["input_features"]
            samples = torch.full((len(sound),), sound.shape[1], device=sound.device)
        return self.lengths(samples).long()

    def _of_teacher(self, output: Any, ours: Tensor) -> Tensor:
        theirs = output.logits[: len(ours)].to(ours.device)
        if theirs.shape[1] != ours.shape[1]:
            raise ValueError(
                f"{self.name}: the student answers with {ours.shape[1]} frames, the teacher with "
                f"{theirs.shape[1]}. Choose a teacher whose convolutions have the same strides."
            )
        return theirs
