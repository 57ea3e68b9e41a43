"""The short trainings that tests of callbacks make."""

from tiny import classification_rows, tiny_bert
from transformers import Trainer, TrainingArguments


def arguments(folder, kind=TrainingArguments, **settings):
    """Eight rows a step, a log at each, nothing saved; `settings` on top."""
    defaults = {
        "per_device_train_batch_size": 8,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return kind(str(folder), **(defaults | settings))


def trainer(folder, callback, model=None, rows=classification_rows, **settings):
    """Twenty steps with one callback."""
    return Trainer(
        model if model is not None else tiny_bert(),
        arguments(folder, **({"max_steps": 20, "learning_rate": 1e-3} | settings)),
        train_dataset=rows(),
        callbacks=[callback],
    )
