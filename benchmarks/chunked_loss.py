"""Memory and time of the distillation loss of a language model, whole and in chunks, by vocabulary.

    python benchmarks/chunked_loss.py
    python benchmarks/chunked_loss.py --vocabularies 49152 --chunk_sizes 32 64 128 256 512

Student and teacher give `--tokens` hidden states of `--width`; forward KL at T = 2 and cross-entropy,
backwards to hidden states and weights of the student. Each in a process of its own. `peak_megabytes`
is the highest resident memory over that before the first loss, of which `gradient_megabytes` are the
gradient of the weight, which grows with the vocabulary in any case; `loss_megabytes` is the rest.
`seconds` is the median of the repeats after the first; `auto` the default of the trainer. Prints JSON.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from memory import peak_bytes

from hf_compress.distillation.chunked import chunked_sums
from hf_compress.distillation.chunking import LOGITS
from hf_compress.distillation.divergences import Divergence
from hf_compress.distillation.output_layer import OutputLayer

ALPHA = 0.5
DIVERGENCE = Divergence(temperature=2.0)


def whole(hidden, weight, taught, theirs, labels):
    student, teacher = hidden @ weight.T, taught @ theirs.T
    task = F.cross_entropy(student.float(), labels, reduction="sum")
    return (1 - ALPHA) * task + ALPHA * DIVERGENCE.between_classes(student, teacher).sum()


def in_chunks(hidden, weight, taught, theirs, labels, *, chunk_size):
    sums = chunked_sums(
        hidden,
        OutputLayer(weight=weight),
        [(taught, OutputLayer(weight=theirs))],
        labels,
        torch.ones_like(labels, dtype=torch.bool),
        divergence=DIVERGENCE,
        alpha=ALPHA,
        chunk_size=chunk_size,
    )
    return (1 - ALPHA) * sums.task + ALPHA * sums.distillation


def size_of(chunk_size, vocabulary):
    return max(1, LOGITS // vocabulary) if chunk_size == "auto" else int(chunk_size)


def measure(options, vocabulary, chunk_size):
    """The work of one process."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    hidden = torch.randn(options.tokens, options.width, requires_grad=True)
    taught = torch.randn(options.tokens, options.width)
    weight, theirs = (torch.randn(vocabulary, options.width) / options.width**0.5 for _ in range(2))
    weight.requires_grad_()
    labels = torch.randint(0, vocabulary, (options.tokens,))
    settings = {} if chunk_size == "whole" else {"chunk_size": size_of(chunk_size, vocabulary)}
    function = in_chunks if settings else whole
    # Sets the peak back to what is resident now.
    Path("/proc/self/clear_refs").write_text("5")
    loaded, seconds = peak_bytes(), []
    for _ in range(options.repeats + 1):
        start = time.perf_counter()
        loss = function(hidden, weight, taught, theirs, labels, **settings)
        loss.backward()
        seconds.append(time.perf_counter() - start)
        norm = float(weight.grad.norm())
        hidden.grad = weight.grad = None
    peak, gradient = peak_bytes() - loaded, 4 * weight.numel()
    return {
        "vocabulary": vocabulary,
        "chunk_size": settings.get("chunk_size", "whole"),
        "peak_megabytes": round(peak / 1e6),
        "gradient_megabytes": round(gradient / 1e6),
        "loss_megabytes": round((peak - gradient) / 1e6),
        "seconds": round(statistics.median(seconds[1:]), 3),
        "loss": round(loss.item() / options.tokens, 5),
        "gradient_norm": round(norm, 4),
    }


def run(options, vocabulary, chunk_size):
    passed = [f"--{name}={vars(options)[name]}" for name in ("tokens", "width", "repeats", "threads")]
    command = [sys.executable, __file__, *passed, "--one", str(vocabulary), chunk_size]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    print(process.stdout.strip(), file=sys.stderr)
    return json.loads(process.stdout)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--vocabularies", type=int, nargs="+", default=[2**15, 2**16, 2**17, 2**18], help="of 32k..256k"
    )
    parser.add_argument("--chunk_sizes", nargs="+", default=["whole", "auto"])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        vocabulary, chunk_size = options.one
        print(json.dumps(measure(options, int(vocabulary), chunk_size)))
        return
    found = [
        run(options, vocabulary, chunk_size)
        for vocabulary in options.vocabularies
        for chunk_size in options.chunk_sizes
    ]
    settings = {name: vars(options)[name] for name in ("tokens", "width", "repeats", "threads")}
    print(json.dumps({**settings, "torch": torch.__version__, "found": found}))


if __name__ == "__main__":
    main()
