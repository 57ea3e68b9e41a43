"""The pictures of a card."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_compress.figures import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HISTORY = "sparsity.png"
LAYERS = "layers.png"
BITS = "bits.png"
WEIGHTS = "weights.png"
TRADE = "size_and_score.png"
CODES = "codes.png"
CHOICE = "choice.png"

_LOSSES = {
    "loss": "training loss",
    "loss_task": "loss of the task",
    "loss_kd": "distance to the teacher",
}


# In the order of the card; those without a name here are drawn by `hf_compress.quantization.analysis`,
# that of a choice by `hf_compress.choosing.picture`.
PICTURES = (
    *(TRADE, CHOICE, HISTORY, LAYERS, BITS, WEIGHTS, CODES),
    *("grid_errors.png", "weight_histograms.png"),
)


def draw_all(
    report: Mapping[str, Any], before: Sequence[Tensor], after: Sequence[Tensor], folder: Path
) -> list[str]:
    """Draws into `folder` what `report` and the compressed weights, `before` and `after`, have to show.
    Returns the names of the pictures that are there, those that were before too."""
    tensors, targets = report["audit"]["tensors"], report["audit"]["targets"]
    bits = (method.get("quantized", {}) for method in report["recipe"]["methods"])
    draw_trade(report, folder / TRADE)
    draw_history(report["history"], folder / HISTORY)
    draw_layers({n: tensors[n]["zeros"] / tensors[n]["numel"] for n in targets}, folder / LAYERS)
    draw_bits({name: width for widths in bits for name, width in widths.items()}, folder / BITS)
    draw_weights(before, after, folder / WEIGHTS)
    return [name for name in PICTURES if (folder / name).is_file()]


def draw_history(history: Sequence[Mapping[str, Any]], path: str | Path) -> bool:
    """Sparsity and training losses over optimizer steps, from `trainer.state.log_history`.

    Returns whether there was anything to draw: at least two rows of either.
    """
    sparsity = _series(history, "sparsity")
    losses = {name: _series(history, name) for name in _LOSSES}
    losses = {name: points for name, points in losses.items() if len(points) > 1}
    if len(sparsity) < 2 and not losses:
        return False
    figure = new_figure(7, 4)
    left = figure.add_subplot()
    left.set(xlabel="optimizer step")
    axes = left
    lines = []
    if len(sparsity) > 1:
        lines += left.plot(*zip(*sparsity, strict=True), color="tab:blue", label="sparsity")
        left.set(ylabel="sparsity of the targeted weights", ylim=(0, 1))
        axes = left.twinx()
    for color, (name, points) in zip(("orange", "green", "red"), losses.items(), strict=False):
        label = _LOSSES[name]
        lines += axes.plot(*zip(*points, strict=True), color=f"tab:{color}", label=label)
        axes.set(ylabel="loss")
    figure.legend(handles=lines, loc="outside upper center", ncols=4)
    figure.savefig(path)
    return True


def draw_layers(sparsity: Mapping[str, float], path: str | Path) -> bool:
    """One bar for the fraction of zeros in each weight, by name. False when there are none."""
    if not sparsity:
        return False
    figure = _bars(sparsity, "fraction of zeros in the file", 1)
    _save_tall(figure, path)
    return True


def draw_bits(bits: Mapping[str, int], path: str | Path) -> bool:
    """One bar for the width of each quantized weight. False where all have the same."""
    if len(set(bits.values())) < 2:
        return False
    _save_tall(_bars(bits, "bits of a weight", 8), path)
    return True


def draw_weights(before: Sequence[Tensor], after: Sequence[Tensor], path: str | Path) -> bool:
    """The distribution of all values of the dense weights and of the compressed ones, those that are
    zero apart, up to six standard deviations of the dense ones. False when there are none."""
    if not before or not after:
        return False
    largest = max(float(weight.abs().max()) for weight in (*before, *after))
    count = sum(weight.numel() for weight in before)
    spread = math.sqrt(sum(float(weight.float().square().sum()) for weight in before) / count)
    # A single outlier would leave all the others in one bar.
    limit = min(largest, 6 * spread)
    if not limit:
        return False
    figure = new_figure(7, 4)
    axes = figure.add_subplot()
    for weights, label, filled in ((before, "dense", False), (after, "compressed", True)):
        counts, zeros, total = _histogram(weights, limit)
        edges = torch.linspace(-limit, limit, len(counts) + 1).tolist()
        told = f"{label}, {zeros / total:.1%} exactly zero" if zeros else label
        axes.stairs(
            (counts / total).tolist(), edges, label=told, fill=filled, alpha=0.6 if filled else 1
        )
    axes.set(xlabel="value of a weight", ylabel="fraction of the weights, zeros apart", yscale="log")
    figure.legend(loc="outside upper center", ncols=2)
    figure.savefig(path)
    return True


def draw_trade(report: Mapping[str, Any], path: str | Path) -> bool:
    """The score beside the size of both models. False where one has no score."""
    metric, sides = report["metric"], [report["dense"], report["compressed"]]
    if any(side is None or metric not in side["metrics"] for side in sides):
        return False
    if report.get("adapters"):  # of whose size most is the base's, which lies elsewhere
        return False
    figure = new_figure(7, 3.5)
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, key, label in (
        (left, "bytes", "megabytes on disk"),
        (right, "nonzeros", "million weights that are not zero"),
    ):
        sizes, scores = [side[key] / 1e6 for side in sides], [s["metrics"][metric] for s in sides]
        axes.plot(sizes, scores, color="tab:gray", linestyle=":", zorder=1)
        for size, score, name, marker in zip(sizes, scores, ("dense", "compressed"), "os", strict=True):
            axes.scatter([size], [score], label=name, marker=marker, zorder=2)
        axes.set(xlabel=label, xlim=(0, 1.1 * max(sizes)))
    left.set(ylabel=metric)
    left.margins(y=0.3)
    handles, names = right.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=2)
    figure.savefig(path)
    return True


def draw_codes(counts: Mapping[int, int], path: str | Path) -> bool:
    """One bar for the fraction of weights that have each integer code. False when there are none."""
    if not counts:
        return False
    figure = new_figure(7, 4)
    axes = figure.add_subplot()
    total = sum(counts.values())
    axes.bar(list(counts), [count / total for count in counts.values()], width=0.9, color="tab:blue")
    # Of pruned weights most are zero, and all others would be flat beside that.
    axes.set(xlabel="integer code", ylabel="fraction of the quantized weights", yscale="log")
    figure.savefig(path)
    return True


def _series(history: Sequence[Mapping[str, Any]], name: str) -> list[tuple[int, float]]:
    return [(row["step"], row[name]) for row in history if name in row]


def _bars(values: Mapping[str, float], label: str, limit: float) -> Figure:
    height = 0.22  # inches of a bar with its name
    figure = new_figure(8, 1 + height * len(values))
    axes = figure.add_subplot()
    axes.barh(range(len(values)), list(values.values()), color="tab:blue")
    axes.set_yticks(range(len(values)), list(values), fontsize=7)
    axes.set(xlabel=label, xlim=(0, limit))
    axes.invert_yaxis()
    axes.margins(y=0.01)
    return figure


def _save_tall(figure: Figure, path: str | Path) -> None:
    # Hundreds of layers would make a picture taller than renderers take.
    figure.savefig(path, dpi=min(100, 20_000 / figure.get_figheight()))


def _histogram(weights: Sequence[Tensor], limit: float) -> tuple[Tensor, int, int]:
    """How many values up to `limit` are in each of 101 bins, the zeros left out; the zeros; and all."""
    counts, zeros, total = torch.zeros(101, dtype=torch.float64), 0, 0
    for weight in weights:
        values = weight.detach().float().flatten().cpu()
        alive = values[values != 0]
        counts += torch.histc(alive, 101, -limit, limit).double()
        zeros, total = zeros + len(values) - len(alive), total + len(values)
    return counts, zeros, total
