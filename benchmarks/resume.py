"""Ten steps against five, a resume from the checkpoint, and five more: bit-equal weights?

python benchmarks/resume.py

Trains a tiny BERT with PruningCallback over optimizers x precisions x accumulation; the schedule is in
full course at the stop. Prints JSON; `different` counts the weights that differ in any bit.
"""

import argparse
import json
import tempfile
from itertools import product

import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from hf_compress import PruningCallback

OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adamw_bnb_8bit", "adafactor", "sgd")
PRECISIONS = ("fp32", "bf16")
ACCUMULATIONS = (1, 2)


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def trainer(folder, optimizer, precision, accumulation, stop):
    set_seed(0)
    # Above 4096 weights in a layer, where the 8-bit optimizer quantizes its state.
    model = BertForSequenceClassification(
        BertConfig(vocab_size=96, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    )
    ids = torch.randint(5, 96, (80, 12))
    rows = Dataset.from_dict({"input_ids": ids.tolist(), "labels": (ids[:, 0] % 2).tolist()})
    return Trainer(
        model,
        TrainingArguments(
            folder,
            max_steps=10,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=accumulation,
            optim=optimizer,
            bf16=precision == "bf16",
            learning_rate=1e-2,
            save_strategy="steps",
            save_steps=5,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=rows,
        callbacks=[PruningCallback(0.8, end=0.9, interval=2), StopAt(stop)],
    )


def compare(*settings):
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
        whole = trainer(one, *settings, stop=10)
        whole.train()
        trainer(two, *settings, stop=5).train()
        resumed = trainer(two, *settings, stop=10)
        resumed.train(resume_from_checkpoint=f"{two}/checkpoint-5")
    pairs = zip(whole.model.state_dict().values(), resumed.model.state_dict().values(), strict=True)
    return sum(int(torch.count_nonzero(a != b)) for a, b in pairs)


def main():
    argparse.ArgumentParser(description=__doc__).parse_args()
    grid = list(product(OPTIMIZERS, PRECISIONS, ACCUMULATIONS))
    rows = [
        {
            "optimizer": optimizer,
            "precision": precision,
            "accumulation": accumulation,
            "different": compare(optimizer, precision, accumulation),
        }
        for optimizer, precision, accumulation in tqdm(grid)
    ]
    print(json.dumps({"bit_equal": not any(row["different"] for row in rows), "rows": rows}))


if __name__ == "__main__":
    main()
