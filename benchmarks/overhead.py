"""Step time and peak memory of Trainer + PruningCallback over bare Trainer, MiniLM at batch 32 x 128.

python benchmarks/overhead.py --steps 50

For the time each training runs in a process of its own, their steps in turn, so that whatever slows
the machine slows both. (In threads of one process, malloc gives back and takes anew all that a step
frees.) Forward and backward are the same code in both and vary by more than the callback takes, so
beside the ratio of whole steps there is one of what differs: the optimizer's step with the callback's
hooks and rankings, over a bare step; while the schedule runs, after it, and over all. Prints JSON.
"""

import argparse
import json
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time

import torch
from datasets import Dataset
from memory import peak_bytes
from transformers import BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from hf_compress import PruningCallback
from hf_compress.samples import minilm

# What the callback takes by default, the interval that of a long training.
END, INTERVAL = 0.6, 10
KINDS = ("bare", "pruned")


class Turns(TrainerCallback):
    """Lets two trainings take steps in turn, and times each step, and the optimizer's part of it."""

    def __init__(self, mine, other):
        self.mine, self.other = mine, other
        self.seconds, self.optimizer = [], []

    def on_step_begin(self, args, state, control, **kwargs):
        self.mine.acquire()
        self.start = time.perf_counter()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.before = time.perf_counter()

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.optimizer.append(time.perf_counter() - self.before)

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.perf_counter() - self.start)
        self.other.release()


def trainer(kind, folder, options, callbacks=()):
    ids = torch.randint(1000, 30000, (options.batch * options.steps, options.length))
    pruning = [PruningCallback(0.9, end=END, interval=INTERVAL)] if kind == "pruned" else []
    rows = Dataset.from_dict({"input_ids": ids.tolist(), "labels": (ids[:, 0] % 8).tolist()})
    return Trainer(
        BertForSequenceClassification.from_pretrained(minilm(), num_labels=8),
        TrainingArguments(
            f"{folder}/{kind}",
            max_steps=options.steps,
            per_device_train_batch_size=options.batch,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=rows,
        callbacks=[*pruning, *callbacks],
    )


def train(kind, options, turns, results):
    with tempfile.TemporaryDirectory() as folder:
        trainer(kind, folder, options, [turns]).train()
    results.put((kind, turns.seconds, turns.optimizer))


def times(options):
    context = multiprocessing.get_context("spawn")
    first, second, results = context.Semaphore(1), context.Semaphore(0), context.Queue()
    turns = {"bare": Turns(first, second), "pruned": Turns(second, first)}
    processes = [context.Process(target=train, args=(k, options, turns[k], results)) for k in KINDS]
    for process in processes:
        process.start()
    for _ in KINDS:
        kind, turns[kind].seconds, turns[kind].optimizer = results.get()
    # The first two steps allocate.
    median = {kind: statistics.median(turn.seconds[2:]) for kind, turn in turns.items()}
    total = {kind: sum(turn.seconds[2:]) for kind, turn in turns.items()}
    end = round(END * options.steps)
    phases = {"while_pruning": slice(2, end), "afterwards": slice(end, None), "all": slice(2, None)}
    optimizer = {
        phase: {kind: statistics.mean(turn.optimizer[steps]) for kind, turn in turns.items()}
        for phase, steps in phases.items()
    }
    return {
        "median_seconds": median,
        "time_ratio_of_medians": median["pruned"] / median["bare"],
        "time_ratio_of_sums": total["pruned"] / total["bare"],
        "median_seconds_in_optimizer_when_ranking": statistics.median(
            turns["pruned"].optimizer[INTERVAL - 1 : end : INTERVAL]
        ),
        "mean_seconds_in_optimizer": optimizer,
        "time_ratio_by_what_differs": {
            phase: 1 + (mean["pruned"] - mean["bare"]) / median["bare"]
            for phase, mean in optimizer.items()
        },
    }


def peak(kind, options):
    command = [sys.executable, __file__, "--peak", kind]
    command += [f"--{name}={getattr(options, name)}" for name in ("batch", "length")]
    run = subprocess.run(
        [*command, f"--steps={INTERVAL + 2}"], capture_output=True, check=True, text=True
    )
    return json.loads(run.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--peak", choices=KINDS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        with tempfile.TemporaryDirectory() as folder:
            trainer(options.peak, folder, options).train()
        print(peak_bytes())
        return
    memory = {kind: peak(kind, options) for kind in KINDS}
    result = {
        "batch": options.batch,
        "length": options.length,
        "steps": options.steps,
        **times(options),
        "peak_bytes": memory,
        "memory_ratio": memory["pruned"] / memory["bare"],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
