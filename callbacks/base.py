"""What every compression callback shares: its numbers reach the logs, and the best checkpoint is one
that is compressed as asked."""

from __future__ import annotations

import abc

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_compress.publishing.progress import write_progress_card


class LoggingCallback(TrainerCallback, abc.ABC):
    """A callback whose `measurements()` are added to each log, to `state.log_history` and to the
    progress bar. Reporters (TensorBoard, W&B, ...) run before the callbacks of the user and so do not
    see them, unless `attach(trainer)` puts this callback before them.
    """

    @abc.abstractmethod
    def measurements(self) -> dict[str, float]:
        """Numbers to log, by flat name."""

    def attach(self, trainer: Trainer) -> None:
        """Log through the reporters of `trainer` too. Adds the callback where it is missing."""
        callbacks = trainer.callback_handler.callbacks
        if self in callbacks:
            callbacks.remove(self)
        callbacks.insert(0, self)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        # Trainer keeps a copy of the logs in the history before it tells the callbacks.
        for row in (logs, state.log_history[-1] if state.log_history else None):
            if row is not None:
                row.update(self.measurements())


class CompressionCallback(LoggingCallback):
    """A callback whose method ramps up. While `finished` is false no checkpoint counts as the best:
    otherwise an early one, denser than asked, would win and be reloaded at the end.
    """

    @property
    @abc.abstractmethod
    def finished(self) -> bool:
        """Whether the model is compressed as asked."""

    @abc.abstractmethod
    def describe(self) -> dict[str, object]:
        """What was done, JSON-able, for the report."""

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        if not self.finished:
            state.best_metric = None
            state.best_global_step = None
            state.best_model_checkpoint = None

    on_step_end = on_step_begin

    def on_push_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: object = None,
        **kwargs: object,
    ) -> None:
        # Trainer goes on to send what is in the output directory.
        if state.is_world_process_zero:
            write_progress_card(model, args, state)
