"""How much a model suffers when one of its weights alone is pruned."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.utils import logging

from hf_compress.figures import new_figure
from hf_compress.pruning.allocate import by_sensitivity
from hf_compress.pruning.masks import check_sparsity
from hf_compress.pruning.select import keep_highest
from hf_compress.targets import Selection, find_targets


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """A metric of a model, by weight and by the sparsity of this weight alone. `str()` is a table.

    dense: the metric without pruning. greater_is_better: whether a good model has a high one.
    """

    metrics: dict[str, dict[float, float]]
    dense: float
    greater_is_better: bool

    def harm(self) -> dict[str, dict[float, float]]:
        """How much worse than dense each entry of `metrics` is."""
        sign = -1.0 if self.greater_is_better else 1.0
        return {
            name: {sparsity: sign * (metric - self.dense) for sparsity, metric in curve.items()}
            for name, curve in self.metrics.items()
        }

    def allocate(self, model: nn.Module, sparsity: float) -> dict[str, float]:
        """A fraction for each weight that was scanned, as `PruningCallback(sparsity=...)` takes it.

        Together they are as sparse as asked, and each alone does the same harm: see
        `hf_compress.pruning.allocate.by_sensitivity`, which also says what it raises.
        """
        weights = {name: model.get_parameter(name) for name in self.metrics}
        return by_sensitivity(weights, sparsity, self.harm())

    def draw(self, path: str | Path) -> None:
        """One curve for each weight, coloured from the first to the last, to a picture file."""
        from matplotlib import colormaps

        few = len(self.metrics) <= 16
        figure = new_figure(9 if few else 7, 5)
        axes = figure.add_subplot()
        colours = colormaps["viridis"].resampled(len(self.metrics))
        for place, (name, curve) in enumerate(self.metrics.items()):
            points = {0.0: self.dense, **curve}
            axes.plot(list(points), list(points.values()), color=colours(place), marker=".", label=name)
        axes.axhline(self.dense, color="grey", linestyle=":", label="dense")
        axes.set(xlabel="sparsity of one weight alone", ylabel="metric of the model")
        if few:
            figure.legend(loc="outside right upper", fontsize=7)
        figure.savefig(path)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)

    def __str__(self) -> str:
        width = max(len(name) for name in self.metrics)
        sparsities = list(next(iter(self.metrics.values())))
        head = f"  {'pruned alone to':{width}}" + "".join(f"{s:>11.4g}" for s in sparsities)
        rows = [
            f"  {name:{width}}" + "".join(f"{metric:>11.4g}" for metric in curve.values())
            for name, curve in self.metrics.items()
        ]
        return "\n".join([f"metric of the dense model: {self.dense:.4g}", head, *rows])


@torch.no_grad()
def scan_sensitivity(
    model: nn.Module,
    evaluate: Callable[[nn.Module], float],
    *,
    greater_is_better: bool,
    sparsities: Sequence[float] = (0.5, 0.7, 0.8, 0.9, 0.95),
    scores: Mapping[str, Tensor] | None = None,
    targets: str | Sequence[str] | None = None,
    ignore: str | Sequence[str] | None = None,
) -> Sensitivity:
    """Prunes each target alone to each sparsity, evaluates the model, and puts the weight back.

    evaluate: function of the model to one number, such as `lambda _: trainer.evaluate()["eval_loss"]`
        with a trainer of this model. It runs once, and once more for each target and sparsity: use as
        few rows as tell a good model from a bad one. It must give equal numbers for equal weights.
    greater_is_better: False for a loss, True for an accuracy.
    sparsities: fractions in (0, 1), rising. A metric that is not finite counts as too much pruning.
    scores: what ranks the weights, of the shape of each target, by its name; by default |w|.
    targets, ignore: see `hf_compress.targets.find_targets`.

    The model is bit for bit what it was afterwards, also when `evaluate` raises.

    Raises ValueError for sparsities or scores that are not as above, targets that match nothing, and a
    dense model whose metric is not finite; TypeError for an `evaluate` that is no function to a number.
    """
    if not callable(evaluate):
        raise TypeError(
            f"`evaluate` is a {type(evaluate).__name__}: pass a function of the model, such as "
            "`lambda _: trainer.evaluate()['eval_loss']`."
        )
    _check_sparsities(sparsities)
    selection = find_targets(model, targets, ignore)
    if scores is not None:
        _check_scores(selection, scores)
    with logging.tqdm(total=1 + len(selection.targets) * len(sparsities), desc="Scanning") as bar:
        dense = _number(evaluate(model))
        if not math.isfinite(dense):
            raise ValueError(
                f"`evaluate` gave {dense} for the model as it is, and only a finite number can get "
                "worse: look at the model and its data first."
            )
        bar.update()
        metrics: dict[str, dict[float, float]] = {}
        for name, param in selection.parameters.items():
            score = param.detach().abs() if scores is None else scores[name].to(param.device)
            metrics[name] = {}
            for sparsity in sparsities:
                bar.set_postfix_str(f"{name} {sparsity:g}")
                with _pruned(param, score, sparsity):
                    metrics[name][float(sparsity)] = _number(evaluate(model))
                bar.update()
    return Sensitivity(metrics=metrics, dense=dense, greater_is_better=greater_is_better)


def _number(metric: object) -> float:
    if not isinstance(metric, (int, float, Tensor, np.number)):
        raise TypeError(
            f"`evaluate` gave a {type(metric).__name__}: return one number, such as "
            "`trainer.evaluate()['eval_loss']`."
        )
    return float(metric)


@contextmanager
def _pruned(param: nn.Parameter, score: Tensor, sparsity: float) -> Iterator[None]:
    """Meanwhile the lowest of `param` are zero."""
    size = param.numel()
    (kept,) = keep_highest(lambda score: score, [(score,)], size - round(sparsity * size))
    original = param.detach().clone()
    try:
        param.masked_fill_(~kept, 0)
        yield
    finally:
        param.copy_(original)


def _check_sparsities(sparsities: Sequence[float]) -> None:
    several = isinstance(sparsities, Sequence) and not isinstance(sparsities, str)
    for sparsity in sparsities if several else ():
        check_sparsity(sparsity)
    if not several or not sparsities or list(sparsities) != sorted({*sparsities}) or sparsities[0] == 0:
        raise ValueError(
            f"`sparsities` is {sparsities!r}: give fractions in (0, 1) that rise, such as (0.5, 0.9)."
        )


def _check_scores(selection: Selection, scores: Mapping[str, Tensor]) -> None:
    for name, param in selection.parameters.items():
        found = scores.get(name)
        if found is None or found.shape != param.shape:
            given = "nothing" if found is None else f"shape {tuple(found.shape)}"
            raise ValueError(
                f"`scores` has {given} for {name}, whose shape is {tuple(param.shape)}: give a tensor "
                "for each target, by its name."
            )
