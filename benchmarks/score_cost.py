"""Cost of each score's statistic per step, and of each pattern's ranking, in ns per weight.

    python benchmarks/score_cost.py --millions 20 100 400

Time per weight must not grow with their number. Weights are matrices of 2048 x 2048; a ranking prunes
half of them by magnitude. Each figure is the best of three runs, of fewer where they take more than
two seconds. Prints JSON.
"""

import argparse
import json
import time

import torch

from hf_compress import constrain
from hf_compress.pruning.patterns import Pattern
from hf_compress.pruning.ranking import contests
from hf_compress.pruning.regrowth import RigL
from hf_compress.pruning.scores import SCORES, Noise
from hf_compress.targets import Target

WIDTH = 2048
RANKINGS = {
    "global": ("unstructured", "global"),
    "layer": ("unstructured", "layer"),
    "row": ("unstructured", "row"),
    "2:4": ("2:4", "global"),
    "4:8": ("4:8", "global"),
    "8:16": ("8:16", "global"),
    "4x1": ("4x1", "global"),
    "4x4": ("4x4", "global"),
    "rows": ("row", "global"),
}


def best(function, weights):
    seconds = []
    while len(seconds) < 3 and sum(seconds) < 2.0:
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return round(min(seconds) * 1e9 / sum(weight.numel() for weight in weights), 2)


def score_costs(weights):
    costs, grad = {}, torch.randn(WIDTH, WIDTH) * 1e-3
    for name, score in SCORES.items():
        if score.accumulate is None:
            continue
        seen = grad.square().mean(0, keepdim=True) if score.sees == "inputs" else grad
        # One statistic for all, since what is measured is the time.
        statistic = torch.zeros(WIDTH, WIDTH)
        costs[name] = best(
            lambda s=score, t=statistic, g=seen: [s.accumulate(t, w, g, 0.9) for w in weights], weights
        )
    return costs


def ranking_costs(weights):
    named = {str(i): weight for i, weight in enumerate(weights)}
    targets = {name: Target(name, torch.nn.Parameter(w), 1) for name, w in named.items()}
    magnitude, costs = SCORES["magnitude"].formula, {}
    for name, (pattern, scope) in RANKINGS.items():
        groups = contests(named, Pattern.parse(pattern), scope, targets)

        def rank(groups=groups):
            for group in groups:
                due = group.due(0.5, final=0.5, floor=0)
                inputs = [(weight,) for weight in group.weights.values()]
                group.rank(magnitude, inputs, due, at_least=0.0)

        costs[name] = best(rank, weights)
    (group,) = contests(named, Pattern.parse("unstructured"), "global", targets)
    inputs = [(w, Noise(0, name, 0)) for name, w in named.items()]
    costs["global, by random"] = best(
        lambda: group.rank(SCORES["random"].formula, inputs, group.size // 2, at_least=0.0), weights
    )
    return costs


def rigl_cost(weights):
    """One exchange of a tenth, with the optimizer's step taken off."""
    parameters = {str(i): torch.nn.Parameter(weight) for i, weight in enumerate(weights)}
    optimizer = torch.optim.SGD(parameters.values(), lr=0.0)
    rigl = RigL(0.5, fraction=0.1, interval=1, end=1.0)
    constrain(optimizer, parameters, rigl)
    for param in parameters.values():
        param.grad = torch.ones_like(param)

    def step(number):
        rigl.at(number, 10_000)
        optimizer.step()

    with_exchange = best(lambda: step(2), weights)
    return round(with_exchange - best(lambda: step(10_000), weights), 2)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--millions", type=int, nargs="+", default=[20, 100, 400])
    options = parser.parse_args()
    rows = []
    for millions in options.millions:
        count = max(round(millions * 1_000_000 / WIDTH**2), 1)
        weights = [torch.randn(WIDTH, WIDTH) for _ in range(count)]
        rows.append(
            {
                "millions": round(count * WIDTH**2 / 1e6, 1),
                "score_ns_per_weight": score_costs(weights),
                "ranking_ns_per_weight": ranking_costs(weights),
                "rigl_exchange_ns_per_weight": rigl_cost(weights),
            }
        )
    print(json.dumps({"threads": torch.get_num_threads(), "torch": torch.__version__, "rows": rows}))


if __name__ == "__main__":
    main()
