"""A student, its teacher and rows for every head, and their trainings."""

import sys
from functools import partial
from pathlib import Path

import torch

from hf_compress import DistillationArguments, DistillationTrainer
from hf_compress.distillation.cache.precompute import precompute_teacher

sys.path.insert(0, str(Path(__file__).parents[2]))
from distillation import heads
from tiny import classification_rows, language_rows, tiny_bert, tiny_llama

SPREAD = {"initializer_range": 0.3}
CASES = {
    "sequence classification": (partial(tiny_bert, **SPREAD), classification_rows),
    "causal lm": (partial(tiny_llama, **SPREAD), language_rows),
    **{name: (partial(heads.make_model, name), partial(heads.make_rows, name)) for name in heads.HEADS},
}
LANGUAGE = ("causal lm", "masked lm", "t5", "bart", "marian", "whisper")


def pair(case):
    """Student and teacher."""
    make, _ = CASES[case]
    return make(seed=0), make(seed=1).eval()


def rows_of(case, rows=12):
    return CASES[case][1](rows)


def cached(case, folder, rows=12, **settings):
    return precompute_teacher(
        rows_of(case, rows), pair(case)[1], folder=folder, batch_size=5, **settings
    )


def trainer_of(student, teacher, rows, folder, *, eval_rows=None, collator=None, **arguments):
    settings = {
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "num_train_epochs": 1,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
        "optim": "sgd",
    } | arguments
    return DistillationTrainer(
        student,
        DistillationArguments(str(folder), **settings),
        teacher=teacher,
        train_dataset=rows,
        eval_dataset=eval_rows,
        data_collator=collator,
    )


def losses(trainer):
    trainer.train()
    names = ("loss", "loss_task", "loss_kd", "agreement", "grad_norm")
    logs = [log for log in trainer.state.log_history if "loss" in log]
    return torch.tensor([[log[name] for name in names if name in log] for log in logs])
