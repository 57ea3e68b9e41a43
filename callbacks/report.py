"""What a training does to its model, as numbers in every log and as pictures at the end."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from hf_compress.callbacks.base import LoggingCallback
from hf_compress.distributed import local, sum_over_shards
from hf_compress.measure import bytes_in_memory
from hf_compress.publishing.pictures import HISTORY, LAYERS, draw_history, draw_layers

logger = logging.getLogger(__name__)

_NOT_PRUNED = 0.05
"""Fraction of zeros in a matrix that nobody pruned, such as the row of an embedding for padding."""


class ReportCallback(LoggingCallback):
    """Counts the weights of the model at each log, and draws how the training went.

        report = ReportCallback()
        args = TrainingArguments(..., report_to="tensorboard")
        trainer = Trainer(model, args, train_dataset=data, callbacks=[pruning, report])
        report.attach(trainer)

    Logs `nonzeros`, the trained weights that are not zero; `sparsity_overall`, the fraction of zeros
    among all of them, embeddings and heads too, where the `sparsity` of a method is that of its
    targets; and `megabytes`, the size of all weights and buffers as they are in memory, which zeros do
    not change. With `attach` these, and what every other callback of this package measures, reach all
    reporters beside the losses and the agreement of a `DistillationTrainer`, which they see anyway.

    At the end of the training, and before each push while it lasts, `sparsity.png` (sparsity and losses
    over the steps) and `layers.png` (zeros in each weight that has many) are drawn into the output
    directory, each put there whole, and those of an earlier training are taken away. Of weights that
    are sharded there is no `layers.png`, and `megabytes` is that of one process. A picture that cannot
    be written stops no training: the log says why.
    """

    def __init__(self) -> None:
        self._model: Any = None

    def attach(self, trainer: Trainer) -> None:
        """Log through the reporters of `trainer`, the other callbacks of this package too."""
        super().attach(trainer)
        for callback in list(trainer.callback_handler.callbacks):
            if isinstance(callback, LoggingCallback) and callback is not self:
                callback.attach(trainer)

    def measurements(self) -> dict[str, float]:
        if self._model is None:
            return {}
        weights = [weight for weight in self._model.parameters() if weight.requires_grad]
        nonzeros = int(
            sum_over_shards((torch.count_nonzero(local(weight)), weight) for weight in weights)
        )
        total = sum(weight.numel() for weight in weights)
        return {
            "nonzeros": nonzeros,
            "sparsity_overall": 1 - nonzeros / total,
            "megabytes": bytes_in_memory(self._model) / 1e6,
        }

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: object,
    ) -> None:
        self._model = model

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        if state.is_world_process_zero:
            _draw(self._model, state, Path(str(args.output_dir)))

    def on_push_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        # After the training the pictures are there, or those of a card, which are not to be replaced.
        if state.is_world_process_zero and state.global_step < state.max_steps:
            _draw(self._model, state, Path(str(args.output_dir)))


def _draw(model: nn.Module, state: TrainerState, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # A push reads the folder meanwhile: a picture is there whole or not at all.
        with TemporaryDirectory(dir=folder, prefix="_") as place:
            draw_history(state.log_history, Path(place, HISTORY))
            draw_layers(_zeros(model), Path(place, LAYERS))
            for name in (HISTORY, LAYERS):
                if Path(place, name).is_file():
                    os.replace(Path(place, name), folder / name)
                else:
                    (folder / name).unlink(missing_ok=True)
    except (OSError, ImportError) as error:
        logger.warning("The pictures of the training were not drawn: %s", error)


def _zeros(model: nn.Module) -> dict[str, float]:
    """Fraction of zeros in each matrix of `model` that has many, by name; none where it is sharded."""
    # Zeros of packed codes are no zeros of the weights.
    matrices = {n: w for n, w in model.named_parameters() if w.dim() > 1 and w.is_floating_point()}
    if any(isinstance(weight, DTensor) for weight in matrices.values()):
        return {}
    zeros = {name: float((weight == 0).float().mean()) for name, weight in matrices.items()}
    return {name: fraction for name, fraction in zeros.items() if fraction > _NOT_PRUNED}
