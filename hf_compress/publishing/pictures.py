"""The pictures of a card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_compress.figures import new_figure

HISTORY = "sparsity.png"
LAYERS = "layers.png"
CODES = "codes.png"


def draw_history(history: Sequence[Mapping[str, Any]], path: str | Path) -> bool:
    """Sparsity and training loss over optimizer steps, from `trainer.state.log_history`.

    Returns whether there was anything to draw: at least two rows with `sparsity`.
    """
    sparsity = [(row["step"], row["sparsity"]) for row in history if "sparsity" in row]
    loss = [(row["step"], row["loss"]) for row in history if "loss" in row]
    if len(sparsity) < 2:
        return False
    figure = new_figure(7, 4)
    left = figure.add_subplot()
    left.plot(*zip(*sparsity, strict=True), color="tab:blue", label="sparsity")
    left.set(xlabel="optimizer step", ylabel="sparsity of the targeted weights", ylim=(0, 1))
    lines = list(left.lines)
    if loss:
        right = left.twinx()
        right.plot(*zip(*loss, strict=True), color="tab:orange", label="training loss")
        right.set(ylabel="training loss")
        lines += right.lines
    figure.legend(handles=lines, loc="outside upper center", ncols=2)
    figure.savefig(path)
    return True


def draw_layers(sparsity: Mapping[str, float], path: str | Path) -> bool:
    """One bar for the fraction of zeros in each weight, by name. False when there are none."""
    if not sparsity:
        return False
    height = 0.22  # inches of a bar with its name
    figure = new_figure(8, 1 + height * len(sparsity))
    axes = figure.add_subplot()
    axes.barh(range(len(sparsity)), list(sparsity.values()), color="tab:blue")
    axes.set_yticks(range(len(sparsity)), list(sparsity), fontsize=7)
    axes.set(xlabel="fraction of zeros in the file", xlim=(0, 1))
    axes.invert_yaxis()
    axes.margins(y=0.01)
    # Hundreds of layers would make a picture taller than renderers take.
    figure.savefig(path, dpi=min(100, 20_000 / figure.get_figheight()))
    return True


def draw_codes(counts: Mapping[int, int], path: str | Path) -> bool:
    """One bar for the fraction of weights that have each integer code. False when there are none."""
    if not counts:
        return False
    figure = new_figure(7, 4)
    axes = figure.add_subplot()
    total = sum(counts.values())
    axes.bar(list(counts), [count / total for count in counts.values()], width=0.9, color="tab:blue")
    axes.set(xlabel="integer code", ylabel="fraction of the quantized weights")
    figure.savefig(path)
    return True
