"""What a GPU alone can show, in one script of 8 minutes at most: the tests marked `gpu`, then each part
in a process of its own, with a time limit.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --only sparse bits
    python benchmarks/gpu.py --smoke            # tiny models, to try the script itself; also on a CPU

bf16: a step of training with a pruning callback's hooks, fp32 beside bf16 autocast. sparse: a forward
pass with 2:4 weights, dense beside torch's semi-structured kernels, layer by layer. bits: weights in
memory, a forward pass and the decoding of a token, bf16 beside bitsandbytes in 8 and 4 bit. distil: the
loss of a vocabulary of 128k, whole beside in chunks. processes: the same rows and steps on one process
and on one for each GPU, losses beside each other.

Models are random ones of the sizes of real ones: what they say means nothing, what they take does.
Prints JSON; a part that failed or ran out of time has its error in its place.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_compress import constrain, find_targets
from hf_compress.devices import hardware, own_device, peak_allocated, synchronize
from hf_compress.measure import bytes_in_memory, environment
from hf_compress.pruning.pruner import Pruner

ROOT = Path(__file__).parents[1]
# Of each command; processes are two.
SECONDS = {"tests": 130, "bf16": 50, "sparse": 60, "bits": 90, "distil": 50, "processes": 50}
NEW = 16  # tokens that are written


def llama(options, **sizes):
    """Of the width of a model of 1B parameters, with 8 of its layers; random."""
    settings = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 8, "heads": 32}
    if options.smoke:
        settings = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "heads": 4}
    heads = settings.pop("heads")
    config = {"vocab_size": 512 if options.smoke else 32_000, **settings, **sizes}
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(num_attention_heads=heads, num_key_value_heads=heads // 4, **config)
    )


def batch(options, model, rows=8, length=512):
    rows, length = (2, 16) if options.smoke else (rows, length)
    ids = torch.randint(model.config.vocab_size, (rows, length), device=model.device)
    return {"input_ids": ids, "labels": ids}


def timed(run, device, repeats=10):
    """Median seconds, and the peak of torch's memory; the first three runs warm up."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(repeats + 3):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return {"seconds": sorted(seconds[3:])[repeats // 2], "peak_bytes": peak_allocated(device)}


def part_bf16(options):
    device, found = own_device(), {}
    for name in ("fp32", "bf16"):
        model = llama(options).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
        pruner = Pruner(0.5)
        constrain(optimizer, find_targets(model).parameters, pruner)
        inputs, steps = batch(options, model), iter(range(1, 1000))
        step = partial(train_step, model, optimizer, pruner, inputs, steps, short=name == "bf16")
        found[name] = timed(step, device)
        del model, optimizer, pruner, step
    return found


def train_step(model, optimizer, pruner, inputs, steps, *, short):
    with torch.autocast(model.device.type, torch.bfloat16, enabled=short):
        loss = model(**inputs).loss
    loss.backward()
    pruner.at(next(steps), 100)
    optimizer.step()
    optimizer.zero_grad()


def part_sparse(options):
    from hf_compress.pruning.semi_structured import to_semi_structured_

    device = own_device()
    model = llama(options).to(device, torch.bfloat16).eval()
    for target in find_targets(model).targets.values():
        groups = target.param.data.view(-1, 4)
        groups.scatter_(1, groups.abs().topk(2, largest=False).indices, 0)
    inputs = batch(options, model, rows=16)
    with torch.no_grad():
        dense = timed(lambda: model(**inputs), device)
        layers = to_semi_structured_(model, inputs)
        sparse = timed(lambda: model(**inputs), device)
    faster = {name: before / after for name, (before, after) in layers.items()}
    return {"dense": dense, "sparse": sparse, "times_faster_by_layer": faster}


def part_bits(options):
    from hf_compress import load_quantized

    device, found = own_device(), {}
    with TemporaryDirectory() as folder:
        llama(options).save_pretrained(folder)
        for name, bits in (("bf16", None), ("8 bit", 8), ("4 bit", 4)):
            if bits is None:
                model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device)
            else:
                model = load_quantized(folder, bits, AutoModelForCausalLM)
            model.eval()
            first = batch(options, model, rows=1, length=32)["input_ids"]
            write = partial(model.generate, first, attention_mask=torch.ones_like(first))
            write = partial(write, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
            with torch.no_grad():
                prefill = timed(partial(model, **batch(options, model)), device)
                written = timed(write, device, repeats=3)
            found[name] = {
                "weight_bytes": bytes_in_memory(model),
                "forward": prefill,
                "seconds_for_a_token": written["seconds"] / NEW,
            }
            del model, write
    return found


def part_distil(options):
    import chunked_loss

    device, found = own_device(), {}
    tokens, width, vocabulary = (64, 64, 1024) if options.smoke else (4096, 2048, 128_256)
    labels = torch.randint(vocabulary, (tokens,), device=device)
    for name in ("whole", "auto"):
        torch.manual_seed(0)
        hidden, taught = (torch.randn(tokens, width, device=device) for _ in range(2))
        weight, theirs = (torch.randn(vocabulary, width, device=device) / width**0.5 for _ in range(2))
        hidden.requires_grad_()
        weight.requires_grad_()
        settings = {} if name == "whole" else {"chunk_size": chunked_loss.size_of("auto", vocabulary)}
        function = chunked_loss.in_chunks if settings else chunked_loss.whole

        def step(tensors=(hidden, weight, taught, theirs), function=function, settings=settings):
            loss = function(*tensors, labels, **settings)
            loss.backward()
            for tensor in tensors:
                tensor.grad = None
            return float(loss.detach()) / tokens

        found[name] = timed(step, device, repeats=5) | {"loss": step()}
        del hidden, taught, weight, theirs, step
    return found


def part_processes(options):
    """Run once by each of the processes; the first one prints."""
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    from hf_compress import PruningCallback

    model = llama(options, num_hidden_layers=2)
    rows = torch.randint(model.config.vocab_size, (64, 16 if options.smoke else 256)).tolist()
    with TemporaryDirectory() as folder:
        # The same rows for each step, however many processes share them.
        shared = 8 // int(os.environ.get("WORLD_SIZE", "1"))
        args = TrainingArguments(
            folder,
            max_steps=8,
            per_device_train_batch_size=shared,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.accelerator.is_available(),
        )
        data = Dataset.from_dict({"input_ids": rows, "labels": rows})
        trainer = Trainer(model, args, train_dataset=data, callbacks=[PruningCallback(0.5)])
        start = time.perf_counter()
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        zeros = [int((p == 0).sum()) for p in find_targets(model).parameters.values()]
        return {
            "processes": trainer.args.world_size,
            "losses": losses,
            "zeros": sum(zeros),
            "seconds": time.perf_counter() - start,
        }


PARTS = {
    "bf16": part_bf16,
    "sparse": part_sparse,
    "bits": part_bits,
    "distil": part_distil,
    "processes": part_processes,
}


def commands(options, name):
    """What is run for a part."""
    flags = ["--smoke"] if options.smoke else []
    if name == "tests":
        return [[sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "tests"]]
    alone = [sys.executable, __file__, "--part", name, *flags]
    if name != "processes":
        return [alone]
    count = 2 if options.smoke else torch.cuda.device_count()
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    together = [*launch, str(count), __file__, "--part", name, *flags]
    return [alone, together] if count > 1 else [alone]


def run(options, name):
    found, start = [], time.perf_counter()
    limit = SECONDS[name] * (4 if options.smoke else 1)
    variables = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'benchmarks'}"}
    for command in commands(options, name):
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=limit,
                cwd=ROOT,
                env=variables,
            )
        except subprocess.TimeoutExpired:
            found.append({"error": f"longer than {limit} s"})
            continue
        last = (done.stdout.strip().splitlines() or [""])[-1]
        if name == "tests":
            found.append({"status": done.returncode, "summary": last})
        elif done.returncode:
            found.append({"error": done.stderr.strip()[-800:]})
        else:
            found.append(json.loads(last))
    return {"seconds": round(time.perf_counter() - start, 1), "found": found}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=tuple(SECONDS), default=tuple(SECONDS))
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--part", choices=tuple(PARTS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        found = PARTS[options.part](options)
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(found))
        return
    if not options.smoke and not torch.cuda.is_available():
        raise SystemExit("no CUDA device is here; `--smoke` tries the script itself on a CPU.")
    result = {"hardware": hardware(), "environment": environment(), "smoke": options.smoke}
    for name in options.only:
        result[name] = run(options, name)
        print(f"{name}: {json.dumps(result[name])[:300]}", file=sys.stderr)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
