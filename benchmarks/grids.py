"""Each integer grid beside the others, without training: how far it puts the weights from what they
were, and what a model rounded to nearest on it is still worth.

    python benchmarks/grids.py minilm --rows 4000 --bf16
    python benchmarks/grids.py smollm2

`minilm`: fine-tuned on 20 Newsgroups, the test accuracy; `smollm2`: perplexity on prose held out, of
the model that benchmarks/quantized_smollm2.py tunes. Errors are ||w - q(w)|| / ||w|| over all
quantized weights. Grids with zero points are "affine": their files are larger. Each row is kept in the
cache as soon as it is done. Prints JSON.
"""

import argparse
import json
import math

import minilm
import smollm2
import torch
from quantized_smollm2 import tuned
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from hf_compress import quantize_oneshot_
from hf_compress.quantization.statistics import SCHEMES
from hf_compress.targets import find_targets


def weights_of(model):
    return {name: param.detach().clone() for name, param in find_targets(model).parameters.items()}


def distance(weights, before):
    """Of all weights together, relative."""
    squares = sum(float((weights[name] - before[name]).double().square().sum()) for name in before)
    return math.sqrt(squares / sum(float(w.double().square().sum()) for w in before.values()))


def run(load, evaluate, label, bits, group_size):
    model = load()
    if label is None:
        return {"score": evaluate(model)}
    before, (grid, symmetric) = weights_of(model), SCHEMES[label]
    quantize_oneshot_(model, bits=bits, group_size=group_size, grid=grid, symmetric=symmetric)
    return {"error": distance(weights_of(model), before), "score": evaluate(model)}


def of_minilm(options):
    """How to load and evaluate it, and where its rows are kept."""
    (tokenizer, train, test, names), folder = minilm.dense_of("20newsgroups", options)
    test = test.select(range(min(options.test_rows, len(test))))

    def evaluate(model):
        fine = minilm.trainer(
            model, minilm.CACHE / "tmp", tokenizer, train, test, bf16=options.bf16, disable_tqdm=True
        )
        return fine.evaluate()["eval_accuracy"]

    cut = (options.test_rows, options.bf16)
    return lambda: minilm.classifier(folder, names), evaluate, folder, cut


def of_smollm2(options):
    _, tokenizer = smollm2.load()
    count = options.calibration_rows + options.train_rows
    prose = smollm2.rows(tokenizer, "book-excerpts", count, options.length)
    folder = tuned(prose[options.calibration_rows :], options)
    held_out = smollm2.rows(tokenizer, "grimm-tales", options.evaluation_rows, options.length)

    def load():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    cut = (options.evaluation_rows,)
    return load, lambda model: smollm2.perplexity(model, held_out), folder, cut


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    models = parser.add_subparsers(dest="model", required=True)
    for name, group_size in (("minilm", 32), ("smollm2", 64)):
        sub = models.add_parser(name)
        sub.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
        sub.add_argument("--grids", nargs="+", choices=SCHEMES, default=list(SCHEMES), metavar="GRID")
        sub.add_argument("--group_size", type=int, default=group_size)
        if name == "minilm":
            minilm.add_dense_arguments(sub)
            sub.add_argument("--test_rows", type=int, default=2000)
        else:
            sub.add_argument("--length", type=int, default=256, help="tokens for each row")
            sub.add_argument("--train_rows", type=int, default=400, help="of the dense model's tuning")
            sub.add_argument("--calibration_rows", type=int, default=32, help="left out of these")
            sub.add_argument("--evaluation_rows", type=int, default=16)
    options = parser.parse_args()
    of = of_minilm if options.model == "minilm" else of_smollm2
    load, evaluate, folder, cut = of(options)
    runs = folder.with_name("-".join([folder.name, "grids", *map(str, (options.group_size, *cut))]))
    asked = [(None, None), *((label, bits) for bits in options.bits for label in options.grids)]
    found = {}
    for label, bits in tqdm(asked, unit="run"):
        name = "dense" if label is None else f"{bits} bit {label}"
        found[name] = minilm.cached(
            runs / f"{name.replace(' ', '-')}.json",
            lambda label=label, bits=bits: run(load, evaluate, label, bits, options.group_size),
        )
    print(json.dumps({**vars(options), "found": found}))


if __name__ == "__main__":
    main()
