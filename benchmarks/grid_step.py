"""What training on the grid adds to an optimizer's step: MiniLM's 10.8M targeted weights, fused AdamW.

    OMP_NUM_THREADS=1 python benchmarks/grid_step.py

Milliseconds of one thread's CPU time, the median over steps, so that it can be measured beside other
work; `fit` is a step in which the grid is fitted anew. Prints JSON.
"""

import argparse
import json
import statistics
import time

import torch
from transformers import BertForSequenceClassification

from hf_compress import constrain, find_targets
from hf_compress.quantization.quantizer import Quantizer
from hf_compress.samples import minilm

INTERVAL = 10
KINDS = {
    "bare": None,
    "mse": {},
    "mse with zero points": {"symmetric": False},
    "minmax, fitted each step": {"grid": "minmax", "interval": 1},
    "mse, learned scales": {"learn_scale": True},
}


def run(settings, options):
    model = BertForSequenceClassification.from_pretrained(minilm(), num_labels=8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    for param in model.parameters():
        param.grad = torch.randn_like(param) * 1e-3
    # The grid moves to the last step.
    total = options.steps + 1
    quantizer = None
    if settings is not None:
        selection = find_targets(model)
        settings = {"interval": INTERVAL} | settings
        quantizer = Quantizer(4, group_size=32, end=total, targets=selection.targets, **settings)
        quantizer.at(0, total)
        constrain(optimizer, selection.parameters, quantizer)
    seconds = []
    for step in range(1, options.steps + 1):
        if quantizer is not None:
            quantizer.at(step, total)
        start = time.thread_time()
        optimizer.step()
        seconds.append(time.thread_time() - start)
    fits = seconds[INTERVAL - 1 :: INTERVAL]
    plain = [seconds[i] for i in range(2, len(seconds)) if (i + 1) % INTERVAL]
    return {
        "step": round(1e3 * statistics.median(plain), 1),
        "fit": round(1e3 * statistics.median(fits), 1),
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()
    if torch.get_num_threads() != 1:
        parser.error("it counts one thread only: set OMP_NUM_THREADS=1")
    found = {kind: run(settings, options) for kind, settings in KINDS.items()}
    print(json.dumps({"milliseconds": found, "steps": options.steps, "torch": torch.__version__}))


if __name__ == "__main__":
    main()
