"""What the inputs of layers look like while the model trains: a statistic for scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_compress.targets import Target


class InputSquares:
    """The mean square of each input feature of the layers of `targets`, over one optimizer step.

    Forward hooks on the layers add up what passes in training mode; evaluation does not count. All
    positions count alike: which ones are padding cannot be told from inside a layer.

    Memory: a vector of the input features for each layer. Time: one pass over the inputs.

    Raises ValueError for a weight whose inputs no layer of its own sees, such as stacked experts.
    """

    def __init__(self, model: nn.Module, targets: Mapping[str, Target]) -> None:
        self._targets = dict(targets)
        # For each layer the sums, and behind them the number of positions.
        self._sums: dict[str, Tensor] = {}
        self._closed = False
        layers: dict[str, nn.Module] = {}
        for name, target in self._targets.items():
            layers[name] = model.get_submodule(target.owner)
            if not isinstance(layers[name], (nn.Linear, Conv1D)):
                raise ValueError(
                    f"the inputs of {name} cannot be seen from outside {type(layers[name]).__name__}: "
                    "leave it out by `ignore`, or choose a score of gradients such as 'obd'."
                )
            features = target.param.shape[target.input_dim]
            self._sums[name] = torch.zeros(features + 1, device=target.param.device)
        self._hooks = [
            layer.register_forward_pre_hook(self._adder(name)) for name, layer in layers.items()
        ]

    def remove(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()

    def close(self) -> None:
        """The step has all its inputs: what passes from now on belongs to the next one."""
        self._closed = True

    @torch.no_grad()
    def means(self) -> dict[str, Tensor]:
        """The means over the micro-batches of the step and over all ranks, by name of the weight and
        in a shape that broadcasts over it. Every rank has to call this.

        Raises RuntimeError for a layer through which nothing passed.
        """
        sums = torch.cat(list(self._sums.values()))
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(sums)
        means = {}
        for (name, target), part in zip(
            self._targets.items(), sums.split([len(s) for s in self._sums.values()]), strict=True
        ):
            if part[-1] == 0:
                raise RuntimeError(
                    f"{name} was used without calling its layer, so its inputs are not known: leave it "
                    "out by `ignore`, or choose a score of gradients such as 'obd'."
                )
            means[name] = (part[:-1] / part[-1]).view((-1, 1) if target.input_dim == 0 else (1, -1))
        return means

    def _adder(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if not layer.training:
                return
            if self._closed:
                for sums in self._sums.values():
                    sums.zero_()
                self._closed = False
            rows = inputs[0].detach().float().flatten(0, -2)
            self._sums[name][:-1] += rows.square().sum(0)
            self._sums[name][-1] += len(rows)

        return add
