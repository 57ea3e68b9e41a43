"""Step time and peak memory of Trainer + callback over bare Trainer, MiniLM at batch 32 x 128.

    python benchmarks/overhead.py --steps 50
    python benchmarks/overhead.py --steps 50 --kinds quantized torchao

Kinds: `pruned` to 90 %; `quantized`, weights of 4 bits in groups of 32; `torchao`, the same by its
quantization-aware training, whose fake quantization is part of forward and backward. For the time each
training runs in a process of its own, their steps in turn, so that whatever slows the machine slows
all. (In threads of one process, malloc gives back and takes anew all that a step frees.) Forward and
backward are the same code with a callback and vary by more than it takes, so beside the ratio of whole
steps there is one of what differs: the optimizer's step with the callback's hooks and rankings, over a
bare step; while the schedule runs, after it, and over all. `--clock cpu` takes the time of the
processor instead of the wall's, for a machine that others use too: with one thread
(OMP_NUM_THREADS=1), since those that wait may count as well. Prints JSON.
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
from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_
from torchao.quantization.qat import QATConfig
from transformers import BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from hf_compress import PruningCallback, QuantizationCallback
from hf_compress.samples import minilm
from hf_compress.targets import find_targets

# What the callback takes by default, the interval that of a long training.
END, INTERVAL = 0.6, 10
BITS, GROUP_SIZE = 4, 32
KINDS = ("pruned", "quantized", "torchao")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


class Turns(TrainerCallback):
    """Lets trainings take steps in turn, and times each step, and the optimizer's part of it."""

    def __init__(self, mine, following, clock):
        self.mine, self.following = mine, following
        self.clock = CLOCKS[clock]
        self.seconds, self.optimizer = [], []

    def on_step_begin(self, args, state, control, **kwargs):
        self.mine.acquire()
        self.start = self.clock()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.before = self.clock()

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.optimizer.append(self.clock() - self.before)

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(self.clock() - self.start)
        self.following.release()


def trainer(kind, folder, options, callbacks=()):
    ids = torch.randint(1000, 30000, (options.batch * options.steps, options.length))
    model = BertForSequenceClassification.from_pretrained(minilm(), num_labels=8)
    added = []
    if kind == "pruned":
        added = [PruningCallback(0.9, end=END, interval=INTERVAL)]
    elif kind == "quantized":
        added = [QuantizationCallback(BITS, group_size=GROUP_SIZE, end=END, interval=INTERVAL)]
    elif kind == "torchao":
        base = IntxWeightOnlyConfig(torch.int4, PerGroup(GROUP_SIZE))
        owners = {target.owner for target in find_targets(model).targets.values()}
        quantize_(model, QATConfig(base, step="prepare"), filter_fn=lambda _, name: name in owners)
    rows = Dataset.from_dict({"input_ids": ids.tolist(), "labels": (ids[:, 0] % 8).tolist()})
    return Trainer(
        model,
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
        callbacks=[*added, *callbacks],
    )


def train(kind, options, turns, results):
    with tempfile.TemporaryDirectory() as folder:
        trainer(kind, folder, options, [turns]).train()
    results.put((kind, turns.seconds, turns.optimizer))


def times(options):
    context = multiprocessing.get_context("spawn")
    kinds, results = ("bare", *options.kinds), context.Queue()
    gates = [context.Semaphore(int(i == 0)) for i in range(len(kinds))]
    turns = {
        kind: Turns(gates[i], gates[(i + 1) % len(kinds)], options.clock)
        for i, kind in enumerate(kinds)
    }
    processes = [context.Process(target=train, args=(k, options, turns[k], results)) for k in kinds]
    for process in processes:
        process.start()
    for _ in kinds:
        kind, turns[kind].seconds, turns[kind].optimizer = results.get()
    found = {kind: compared(turns["bare"], turns[kind]) for kind in options.kinds}
    for kind in {"pruned", "quantized"}.intersection(found):
        found[kind] |= by_what_differs(turns["bare"], turns[kind], options.steps)
    return found


def compared(bare, other):
    """How much longer steps of `other` took. The first two allocate, and are left out.

    Of each turn the ratio to the bare step of the same turn too: what slows the machine for seconds
    slows both.
    """
    median = {
        "bare": statistics.median(bare.seconds[2:]),
        "other": statistics.median(other.seconds[2:]),
    }
    return {
        "median_seconds": median["other"],
        "median_seconds_bare": median["bare"],
        "time_ratio_of_medians": median["other"] / median["bare"],
        "time_ratio_of_sums": sum(other.seconds[2:]) / sum(bare.seconds[2:]),
        "time_ratio_median_of_turns": statistics.median(
            its / own for its, own in zip(other.seconds[2:], bare.seconds[2:], strict=True)
        ),
    }


def by_what_differs(bare, other, steps):
    """The same where only the optimizer's step is another."""
    end = round(END * steps)
    phases = {"while_compressing": slice(2, end), "afterwards": slice(end, None), "all": slice(2, None)}
    mean = {
        phase: {
            "bare": statistics.mean(bare.optimizer[part]),
            "other": statistics.mean(other.optimizer[part]),
        }
        for phase, part in phases.items()
    }
    step = statistics.median(bare.seconds[2:])
    return {
        "mean_seconds_in_optimizer": mean,
        "median_seconds_in_optimizer_every_interval": statistics.median(
            other.optimizer[INTERVAL - 1 : end : INTERVAL]
        ),
        "time_ratio_by_what_differs": {
            phase: 1 + (both["other"] - both["bare"]) / step for phase, both in mean.items()
        },
    }


def peak(kind, options):
    command = [sys.executable, __file__, "--peak", kind]
    command += [f"--{name}={getattr(options, name)}" for name in ("batch", "length")]
    run = subprocess.run(
        [*command, f"--steps={2 * INTERVAL}"], capture_output=True, check=True, text=True
    )
    return json.loads(run.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["pruned"])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--no_memory", action="store_true", help="measure the time alone")
    parser.add_argument("--peak", choices=("bare", *KINDS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.steps < 2 * INTERVAL:
        parser.error(f"--steps is {options.steps}: pass {2 * INTERVAL} or more")
    if options.peak:
        with tempfile.TemporaryDirectory() as folder:
            trainer(options.peak, folder, options).train()
        print(peak_bytes())
        return
    memory = {}
    if not options.no_memory:
        memory = {kind: peak(kind, options) for kind in ("bare", *options.kinds)}
    result = {
        "clock": options.clock,
        "batch": options.batch,
        "length": options.length,
        "steps": options.steps,
        **times(options),
        "peak_bytes": memory,
        "memory_ratio": {kind: memory[kind] / memory["bare"] for kind in memory},
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
