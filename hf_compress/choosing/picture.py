"""The front of a choice: score beside size and latency."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from hf_compress.choosing.halving import nondominated
from hf_compress.choosing.limits import Measured
from hf_compress.choosing.search import Choice
from hf_compress.figures import new_figure

_COLORS = ("tab:orange", "tab:purple", "tab:brown", "tab:pink")  # of runtimes


def draw_front(choice: Choice, path: str | Path) -> None:
    """Finalists and the dense model by what they weigh and take; what was stopped early in grey, with
    the score of its last rung; what was exported as triangles, a colour for each runtime. Each side has
    the line of its own front. The shaded part is outside the limits."""
    figure = new_figure(9, 4.5)
    left, right = figure.subplots(1, 2, sharey=True)
    metric, limits = choice.metric, choice.limits
    stopped = [e for e in choice.tried if e.finished is None and e.trainings]
    for axes, (cost, label, limit) in zip((left, right), _sides(choice), strict=True):
        if stopped:
            axes.scatter(
                [cost(e.measured) for e in stopped],
                [e.trainings[-1].score for e in stopped],
                marker="x",
                color="tab:gray",
                alpha=0.6,
                label="stopped early, at that step",
            )
        points = [(cost(e.measured), e.finished.validation) for e in choice.finalists if e.finished]
        front = nondominated([(x, -metric.gain(score)) for x, score in points])
        if front:
            line = sorted(points[place] for place in front)
            axes.plot(*zip(*line, strict=True), color="tab:blue", lw=1)
        for each in choice.finalists:
            assert each.finished is not None
            chosen = each is choice.winner
            axes.scatter(
                cost(each.measured),
                each.finished.validation,
                marker="*" if chosen else "o",
                s=160 if chosen else 40,
                color="tab:green" if chosen else "tab:blue",
                label="chosen" if chosen else "trained fully",
                zorder=3,
            )
        runtimes = dict.fromkeys(each.runtime for each in choice.exported)
        for runtime, color in zip(runtimes, _COLORS, strict=False):
            found = [each for each in choice.exported if each.runtime == runtime]
            axes.scatter(
                [cost(each.measured) for each in found],
                [each.validation for each in found],
                marker="^",
                color=color,
                alpha=0.8,
                label=runtime,
            )
        dense = (cost(choice.dense.measured), choice.dense.validation)
        axes.scatter(*dense, marker="s", color="black", label="dense", zorder=3)
        axes.set(xlabel=label)
        axes.set_xlim(left=0)
        if limit is not None:
            axes.axvspan(limit, max(limit, axes.get_xlim()[1]), color="tab:red", alpha=0.08)
        if limits.drop is not None:
            loss = limits.drop / metric.points
            least = choice.dense.validation + (loss if metric.lower else -loss)
            low, high = axes.get_ylim()
            # One that is far from all that was tried would squeeze it into a corner.
            if low <= least <= high:
                axes.axhline(least, color="tab:red", lw=0.8, ls="--", label="limit of the drop")
    left.set(ylabel=f"validation {metric.name}")
    handles = dict(zip(*reversed(right.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=5)
    figure.savefig(path)


def _sides(choice: Choice) -> Iterator[tuple[Callable[[Measured], float], str, float | None]]:
    """For each side what it shows of a model, its label and the limit."""
    limits = choice.limits
    yield lambda m: m.bytes / 1e6, "megabytes on disk", limits.size and limits.size / 1e6
    if limits.speedup is None or limits.latency is not None:
        yield lambda m: m.latency_ms, "milliseconds of a forward pass, median", limits.latency
    else:
        # Milliseconds of different moments would show what is within a limit of ratios outside it.
        yield lambda m: 1 / m.speedup, "time of a forward pass, dense = 1", 1 / limits.speedup
