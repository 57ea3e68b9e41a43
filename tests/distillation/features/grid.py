"""A training step of 8 rows, cut in several ways, with matches of each kind.

Run as a script under `accelerate launch` it does so on several processes, and writes to the file
named on the command line what `run_cuts` returns.
"""

import gc
import json
import sys
import tempfile
from pathlib import Path

import torch
from transformers.utils import logging

from hf_compress import DistillationArguments, DistillationTrainer

sys.path.insert(0, str(Path(__file__).parents[2]))
from tiny import classification_rows, tiny_bert

from hf_compress.distillation.features.match import Match

SPREAD = {"initializer_range": 0.3}
HIDDEN = [Match("hidden", weight=2.0)]
# name: how to make student and teacher, the rows, the matches
CASES = {
    "bert hidden": (tiny_bert, {"layers": 2}, {"layers": 4}, classification_rows(8), HIDDEN),
}


def one_step(case, *, batch_size, accumulation):
    make, student, teacher, rows, matches = CASES[case]
    with tempfile.TemporaryDirectory() as folder:
        trainer = DistillationTrainer(
            make(seed=0, **student, **SPREAD),
            DistillationArguments(
                folder,
                per_device_train_batch_size=batch_size,
                gradient_accumulation_steps=accumulation,
                num_train_epochs=1,
                learning_rate=0.0,
                max_grad_norm=1e9,
                logging_steps=1,
                save_strategy="no",
                use_cpu=True,
                disable_tqdm=True,
                train_sampling_strategy="sequential",
            ),
            train_dataset=rows,
            teacher=make(seed=1, **teacher, **SPREAD),
            matches=matches,
        )
        trainer.train()
    (log,) = (log for log in trainer.state.log_history if "loss" in log)
    return {name: value for name, value in log.items() if "loss" in name or name == "grad_norm"}


def run_cuts(cuts):
    """case -> "batch x accumulation" -> the losses and the norm of the gradient."""
    logging.set_verbosity_error()
    gc.freeze()  # Trainer collects garbage at every start, which is most of the time spent here
    return {
        case: {
            f"{size}x{times}": one_step(case, batch_size=size, accumulation=times)
            for size, times in cuts
        }
        for case in CASES
    }


if __name__ == "__main__":
    results = run_cuts([(4, 1), (2, 2)])
    if torch.distributed.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(results))
    torch.distributed.destroy_process_group()
