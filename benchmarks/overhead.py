"""Step time and peak memory of Trainer + PruningCallback over bare Trainer, MiniLM at batch 32 x 128.

python benchmarks/overhead.py --steps 20

Both trainings run in this process, their steps in turn, so that whatever slows the machine slows both.
Medians of the step times while the schedule runs. Prints JSON.
"""

import argparse
import json
import statistics
import tempfile
import threading
import time

import torch
from datasets import Dataset
from transformers import BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from hf_compress import PruningCallback
from hf_compress.samples import minilm


class Turns(TrainerCallback):
    """Lets two trainings take steps in turn, and times each step from its begin to its end."""

    def __init__(self, mine, other):
        self.mine, self.other = mine, other
        self.seconds = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.mine.acquire()
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.perf_counter() - self.start)
        self.other.release()


def rows(count, length):
    ids = torch.randint(1000, 30000, (count, length))
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": (ids[:, 0] % 8).tolist()})


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=128)
    options = parser.parse_args()
    data = rows(options.batch * options.steps, options.length)
    first, second = threading.Semaphore(1), threading.Semaphore(0)
    turns = {"bare": Turns(first, second), "pruned": Turns(second, first)}
    with tempfile.TemporaryDirectory() as folder:
        trainers = {
            name: Trainer(
                BertForSequenceClassification.from_pretrained(minilm(), num_labels=8),
                TrainingArguments(
                    f"{folder}/{name}",
                    max_steps=options.steps,
                    per_device_train_batch_size=options.batch,
                    save_strategy="no",
                    report_to="none",
                    disable_tqdm=True,
                    use_cpu=True,
                ),
                train_dataset=data,
                callbacks=[*([PruningCallback(0.9, end=1.0)] if name == "pruned" else []), turn],
            )
            for name, turn in turns.items()
        }
        threads = [threading.Thread(target=trainer.train) for trainer in trainers.values()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    median = {name: statistics.median(turn.seconds[2:]) for name, turn in turns.items()}
    model = trainers["pruned"].model
    state = trainers["bare"].optimizer.state
    kept = sum(t.numel() * t.element_size() for s in state.values() for t in s.values())
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    print(
        json.dumps(
            {
                **vars(options),
                "median_seconds": median,
                "time_ratio": median["pruned"] / median["bare"],
                "bytes_of_weights_and_optimizer": weights + kept,
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
            }
        )
    )


if __name__ == "__main__":
    main()
