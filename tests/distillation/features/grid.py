"""Two steps of 8 and 4 rows with matches of every kind, each cut in several ways.

Run as a script under `accelerate launch` it does so on several processes, and writes to the file
named on the command line what `run_cuts` returns.
"""

import gc
import json
import sys
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from transformers.utils import logging

from hf_compress import DistillationArguments, DistillationTrainer

sys.path.insert(0, str(Path(__file__).parents[2]))
from tiny import (
    classification_rows,
    image_rows,
    language_rows,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_t5,
    tiny_vit,
)

from hf_compress.distillation.features.match import Match

WHOLE, LAST = "8x1", (2, 4)
BERT = (tiny_bert, {"initializer_range": 0.3}, classification_rows(12))
LLAMA = (tiny_llama, {"initializer_range": 0.3}, language_rows(12))
PROJECTED = {"projection": True, "learning_rate": 0.1}


def two_languages():
    """Rows of two lengths with their ends left out."""
    return Dataset.from_list(
        [
            {name: row[name] for name in ("input_ids", "attention_mask")}
            | {"labels": row["labels"][: 4 + number % 3] + [-100] * (2 - number % 3)}
            for number, row in enumerate(language_rows(12).to_list())
        ]
    )


# name: how to make models, their config, the rows; changes of the teacher's config; the matches
CASES = {
    "bert vectors": (
        *BERT,
        {"layers": 4},
        [
            Match("embeddings"),
            Match("hidden", weight=2.0),
            Match("hidden", layers="final", distance="cosine", tokens="mean", name="direction"),
            Match("hidden", layers="skip", distance="normalized", tokens="first", name="patient"),
            Match("pooled", weight=0.5),
            Match("bert.encoder.layer.0.intermediate", distance="relative", name="inner"),
        ],
    ),
    "bert attention": (
        *BERT,
        {"layers": 4},
        [
            Match("attention", distance="mse", name="scores"),
            Match("attention", layers="final", weight=2.0),
            Match("queries", relation_heads=2),
            Match("keys"),
            Match("values", layers="final"),
        ],
    ),
    "bert projections": (
        *BERT,
        {"layers": 3, "hidden": 48},
        [Match("hidden", **PROJECTED), Match("embeddings", projection=True)],
    ),
    "bert closest": (*BERT, {"layers": 4}, [Match("hidden", layers="closest")]),
    "llama": (*LLAMA, {"layers": 3}, [Match("hidden", distance="relative"), Match("attention")]),
    "gpt2": (tiny_gpt2, {}, language_rows(12), {"layers": 3}, [Match("hidden"), Match("values")]),
    "vit": (tiny_vit, {}, image_rows(12), {"layers": 3}, [Match("hidden"), Match("attention")]),
    "t5": (tiny_t5, {}, two_languages(), {"layers": 3}, [Match("hidden"), Match("attention")]),
}


def two_steps(case, *, batch_size, accumulation):
    make, config, rows, teacher, matches = CASES[case]
    with tempfile.TemporaryDirectory() as folder:
        trainer = DistillationTrainer(
            make(seed=0, **config),
            DistillationArguments(
                folder,
                per_device_train_batch_size=batch_size,
                gradient_accumulation_steps=accumulation,
                num_train_epochs=1,
                learning_rate=1e-3,
                max_grad_norm=1e9,
                logging_steps=1,
                save_strategy="no",
                use_cpu=True,
                disable_tqdm=True,
                train_sampling_strategy="sequential",
                optim="sgd",
            ),
            train_dataset=rows,
            teacher=make(seed=1, **{**config, **teacher}),
            matches=matches,
        )
        trainer.train()
    steps = [log for log in trainer.state.log_history if "loss" in log]
    matching = trainer.matching
    return {
        "steps": [
            {name: value for name, value in log.items() if "loss" in name or name == "grad_norm"}
            for log in steps
        ],
        "projections": {name: w.norm().item() for name, w in matching.projections.weights.items()},
        "names": sorted(f"loss_{name}" for name in matching.weights),
    }


def run_cuts(cuts):
    """case -> "batch x accumulation" -> the losses and the norm of the gradient in both steps, and the
    projections after them."""
    logging.set_verbosity_error()
    gc.freeze()  # Trainer collects garbage at every start, which is most of the time spent here
    return {
        case: {
            f"{size}x{times}": two_steps(case, batch_size=size, accumulation=times)
            for size, times in cuts
        }
        for case in CASES
    }


if __name__ == "__main__":
    results = run_cuts([(4, 1), (2, 2)])
    if torch.distributed.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(results))
    torch.distributed.destroy_process_group()
