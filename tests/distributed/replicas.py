"""Run by two ranks: a Trainer with PruningCallback. Rank 0 says so when both have the same zeros."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny import classification_rows, tiny_bert
from transformers import Trainer, TrainingArguments

from hf_compress import PruningCallback
from hf_compress.targets import find_targets

if __name__ == "__main__":
    trainer = Trainer(
        tiny_bert(),
        TrainingArguments(
            sys.argv[1],
            max_steps=12,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            save_steps=12,
        ),
        train_dataset=classification_rows(),
        callbacks=[PruningCallback(0.7, interval=3)],
    )
    trainer.train()
    assert dist.get_world_size() == 2
    parameters = find_targets(trainer.model).parameters
    mask = torch.cat([(p == 0).flatten() for p in parameters.values()]).to(torch.int32)
    assert int(mask.sum()) == round(0.7 * len(mask))
    both = mask.clone()
    dist.all_reduce(both)
    assert both.equal(2 * mask)
    if dist.get_rank() == 0:
        print("same zeros")
    trainer.end()
