"""Pictures of weights and of the grids that suit them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from hf_compress.figures import new_figure
from hf_compress.quantization.schemes import GRIDS
from hf_compress.quantization.statistics import BINS, SCHEMES, WeightStatistics

_DRAWN = 6


def draw_errors(weights: Mapping[str, WeightStatistics], bits: Sequence[int], path: str | Path) -> None:
    """The error of each grid at each width over the weights, to a picture file."""
    figure = new_figure(9, 1 + 2.5 * len(bits))
    rows = figure.subplots(len(bits), 1, sharex=True, squeeze=False)[:, 0]
    places = range(len(weights))
    for axes, width in zip(rows, bits, strict=True):
        for label, (grid, symmetric) in SCHEMES.items():
            axes.plot(
                places,
                [weight.errors[width][label] for weight in weights.values()],
                color=f"C{list(GRIDS).index(grid)}",
                linestyle="-" if symmetric else "--",
                marker=".",
                label=label,
            )
        axes.set(ylabel=f"relative error, {width} bit")
        axes.set_ylim(bottom=0)
    if len(weights) <= 16:
        rows[-1].set_xticks(places, list(weights), rotation=90, fontsize=7)
    else:
        rows[-1].set(xlabel="weight, from the first to the last")
    figure.legend(handles=rows[0].lines, loc="outside upper center", ncols=4, fontsize=8)
    figure.savefig(path)


def draw_histograms(
    weights: Mapping[str, WeightStatistics], bits: Sequence[int], path: str | Path
) -> None:
    """The six weights that are the farthest from their best grid at the lowest width, with the median
    and the range of the best grid at each width, to a picture file."""
    fewest = min(bits)
    farthest = sorted(weights.items(), key=lambda item: -min(item[1].errors[fewest].values()))
    drawn = farthest[:_DRAWN]
    figure = new_figure(9, 1 + 2 * len(drawn))
    rows = figure.subplots(len(drawn), 1, squeeze=False)[:, 0]
    for axes, (name, weight) in zip(rows, drawn, strict=True):
        step = (weight.highest - weight.lowest) / BINS
        edges = [weight.lowest + step * place for place in range(BINS + 1)]
        axes.stairs(weight.histogram, edges, fill=True, color="lightgrey")
        axes.axvline(weight.median, color="black", linewidth=0.8, label=f"median {weight.median:.2g}")
        for place, width in enumerate(bits):
            best = weight.best(width)
            for value in weight.ranges[width][best]:
                axes.axvline(value, color=f"C{place}", linestyle=":")
            axes.plot([], [], color=f"C{place}", linestyle=":", label=f"{width} bit: {best}")
        axes.set_yscale("log")
        axes.set_ylim(bottom=0.5)  # below a single weight, so that outliers are seen
        axes.set_title(name, fontsize=8)
        axes.legend(fontsize=7, loc="upper right")
    figure.supylabel("number of weights", fontsize=9)
    figure.supxlabel("value; dotted: the ends of the best grid, averaged over its groups", fontsize=9)
    figure.savefig(path)
