"""The same 12 rows, trained for two steps of 8 and 4 rows, each cut in several ways.

Run as a script under `accelerate launch` it does so on several processes, and writes to the file
named on the command line what `run_cuts` returns.
"""

import gc
import json
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers.utils import logging

from hf_compress import DistillationArguments, DistillationTrainer

sys.path.insert(0, str(Path(__file__).parents[1]))
from distillation import heads
from tiny import VOCABULARY, language_rows, tiny_bert, tiny_llama, tiny_llama_classifier

ROWS = 12


def rows_with(labels):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, VOCABULARY, (ROWS, 12), generator=generator)
    return Dataset.from_dict(
        {
            "input_ids": ids.tolist(),
            "attention_mask": torch.ones_like(ids).tolist(),
            "labels": labels,
        }
    )


def partly_masked_language():
    """Ragged rows, of which two neighbours have no label at all: a micro-batch without items."""
    rows = language_rows(rows=ROWS).to_list()
    for row in rows[4:6]:
        row["labels"] = [-100] * len(row["labels"])
    return Dataset.from_list(rows)


def multi_hot(labels):
    generator = torch.Generator().manual_seed(2)
    values = torch.randint(0, 2, (ROWS, labels), generator=generator).float()
    values[0, 0] = -100  # not known
    return values.tolist()


def tiny_lora(seed, **config):
    model = tiny_llama(seed=seed, **config)
    # Not the zero start of LoRA, where half the gradients vanish.
    return get_peft_model(model, LoraConfig(r=2, init_lora_weights=False))


SINGLE = [0, 1, 2, 0, -100, -100, 1, 0, 2, -100, 1, 1]
REAL = [0.3, -1.2, 2.0, 0.1, -0.7, 1.1, 0.0, -0.2, 0.4, 0.2, -2.0, 0.6]
# Spread-out logits, so that the distillation part of the gradient is as large as the task's.
SPREAD = {"initializer_range": 0.3}
MULTI = {"num_labels": 3, "problem_type": "multi_label_classification", **SPREAD}
CASES = {
    "bert single-label": (tiny_bert, {"num_labels": 3, **SPREAD}, rows_with(SINGLE)),
    "bert multi-label": (tiny_bert, MULTI, rows_with(multi_hot(3))),
    "bert regression": (tiny_bert, {"num_labels": 1, **SPREAD}, rows_with(REAL)),
    "llama single-label": (tiny_llama_classifier, {"num_labels": 3, **SPREAD}, rows_with(SINGLE)),
    "llama multi-label": (tiny_llama_classifier, MULTI, rows_with(multi_hot(3))),
    "llama regression": (tiny_llama_classifier, {"num_labels": 1, **SPREAD}, rows_with(REAL)),
    "llama causal": (tiny_llama, SPREAD, partly_masked_language()),
    "llama causal, lora": (tiny_lora, SPREAD, partly_masked_language()),
    "llama causal, lora and base": (tiny_lora, SPREAD, partly_masked_language()),
    **{
        name: (partial(heads.make_model, name), {}, heads.make_rows(name, ROWS)) for name in heads.HEADS
    },
}


def two_steps(case, *, batch_size, accumulation):
    make, config, rows = CASES[case]
    with tempfile.TemporaryDirectory() as folder:
        trainer = DistillationTrainer(
            make(seed=0, **config),
            DistillationArguments(
                folder,
                per_device_train_batch_size=batch_size,
                per_device_eval_batch_size=batch_size,
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
            # 9 rows: the last batch is filled up with repeated ones where there are two processes.
            eval_dataset=rows.select(range(9)),
            teacher="base" if case.endswith("base") else make(seed=1, **config),
        )
        trainer.train()
        evaluated = trainer.evaluate()
    steps = [log for log in trainer.state.log_history if "loss" in log]
    names = ("loss", "loss_task", "loss_kd", "agreement", "grad_norm")
    return {
        "steps": [{name: log[name] for name in names if name in log} for log in steps],
        "eval": {name: evaluated[f"eval_{name}"] for name in names if f"eval_{name}" in evaluated},
    }


def run_cuts(cuts):
    """case -> "batch x accumulation" -> the two steps and the evaluation."""
    logging.set_verbosity_error()
    gc.freeze()  # Trainer collects garbage at every start, which is most of the time spent here
    return {
        case: {
            f"{batch_size}x{accumulation}": two_steps(
                case, batch_size=batch_size, accumulation=accumulation
            )
            for batch_size, accumulation in cuts
        }
        for case in CASES
    }


if __name__ == "__main__":
    results = run_cuts([(4, 1), (2, 2)])
    if torch.distributed.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(results))
    torch.distributed.destroy_process_group()
