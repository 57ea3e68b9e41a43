"""Blockwise reconstruction: each block is trained on its grids to answer as it did when it was dense.

What BRECQ (arXiv:2102.05426), AutoRound (arXiv:2309.05516) and the first phase of EfficientQAT
(arXiv:2407.11062) have in common: a block at a time is trained, on little data, and without labels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager

import torch
from torch import Tensor, nn
from transformers.utils import logging

from hf_compress.calibration.batches import Batch, padding_mask
from hf_compress.calibration.layerwise import decoder_around
from hf_compress.calibration.lockstep import Call, called_once, is_inside, lockstep
from hf_compress.constraint import constrain
from hf_compress.frozen import evaluating
from hf_compress.quantization.grids import Grid
from hf_compress.quantization.quantizer import Quantizer
from hf_compress.quantization.schemes import Scheme
from hf_compress.targets import Target

TRAVEL = 0.5
"""How far Adam can move a weight in all steps, in steps of its grid: enough to round it up or down.
Twice as far it learns little data by heart, and other texts come out wrong."""

BETAS = (0.9, 0.99)


def round_block_by_block(
    model: nn.Module,
    batches: Sequence[Batch],
    targets: Sequence[Target],
    scheme: Scheme,
    *,
    steps: int,
) -> dict[str, Grid]:
    """Puts `targets` on grids of `scheme` in place, and returns these by name: see `reconstruct_`.

    All batches go through the model twice at once, in evaluation mode: through the dense blocks, whose
    answers are the aim, and through those that are rounded, whose answers the next block is given. So a
    block also makes up for what those before it have lost.

    Raises ValueError for a target that the first batch does not reach, before anything is changed; on
    the way, for batches of several kinds and for answers that are not finite.
    """
    grids: dict[str, Grid] = {}
    wanted = {_block_around(model, target.owner) for target in targets}
    with evaluating(model):
        names = called_once(model, batches[0], wanted)
        decoder = decoder_around(model, names)
        masks = [padding_mask(batch, "attention_mask") for batch in batches]
        states = _TwoStates()
        with (
            closing(lockstep(model, batches, {*names, *decoder})) as dense,
            closing(lockstep(model, batches, {*names, *decoder})) as rounded,
            closing(states),
            logging.tqdm(total=len(names), desc="Quantizing", unit="block") as bar,
        ):
            for name, taught in dense:
                states.show_rounded()
                _, calls = next(rounded)
                if name in decoder:
                    masks = [padding_mask(batch, "decoder_attention_mask") for batch in batches]
                    continue
                block = model.get_submodule(name)
                own = {t.name: t for t in targets if t.owner == name or is_inside(t.owner, name)}
                with torch.no_grad():
                    answers = [first_output(block(*call.args, **call.kwargs)) for call in taught]
                del taught
                states.begin(target.param for target in own.values())
                grids |= reconstruct_(block, own, calls, answers, masks, scheme, steps=steps)
                del calls, answers
                states.show_dense()
                bar.update()
    return grids


def reconstruct_(
    block: nn.Module,
    targets: Mapping[str, Target],
    calls: Sequence[Call],
    answers: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    scheme: Scheme,
    *,
    steps: int,
) -> dict[str, Grid]:
    """Trains the weights and the scales of `targets`, all in `block`, on grids of `scheme`, in place,
    so that `block` gives `answers` to `calls`; returns the grids.

    answers: one for each call, (..., features); masks: bool, of the shape of an answer without its
        features, False where it does not count. Those of another shape, and None, let all count.
    steps: of Adam, each on one call: in an order that is drawn anew for each time through all of them.

    The loss is the squared error relative to the squared answer: the mean of that of each position, and
    that of all together. In language models a few positions are a thousand times as large as the
    others and hold the attention of all: by the second alone nothing else would count, by the first
    alone hardly they would. Weights that are zero stay zero.
    """
    quantizer = Quantizer(
        scheme.bits,
        group_size=scheme.group_size,
        symmetric=scheme.symmetric,
        grid=scheme.grid,
        end=steps,
        learn_scale=True,
        targets=targets,
    )
    quantizer.at(0, steps)
    params = {name: target.param for name, target in targets.items()}
    pruned = {name: param == 0 for name, param in params.items()}
    optimizer = torch.optim.Adam([{"params": [p]} for p in params.values()], betas=BETAS, eps=1e-20)
    with torch.enable_grad(), _own_gradients(params.values()):
        constraints = constrain(optimizer, params, quantizer)
        sizes = [grid.scale.abs().mean().item() for grid in quantizer.grids.values()]
        for step, index in zip(range(steps), _orders(len(calls)), strict=False):
            call = calls[index]
            answer = first_output(block(*call.args, **call.kwargs))
            loss = _relative_error(answer, answers[index], masks[index])
            if not loss.isfinite():
                raise ValueError(
                    f"the block around `{next(iter(params))}` gives answers that are NaN or infinite: "
                    "mend the model or the calibration; under float16 autocast take bfloat16."
                )
            gradients = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
            for (name, param), gradient in zip(params.items(), gradients, strict=True):
                param.grad = None if gradient is None else gradient.masked_fill_(pruned[name], 0)
            for group, size in zip(optimizer.param_groups, sizes, strict=True):
                group["lr"] = 2 * TRAVEL / steps * size * (1 - step / steps)
            quantizer.at(step + 1, steps)
            optimizer.step()
        constraints.remove()
    return quantizer.grids


def first_output(output: Tensor | Sequence[Tensor]) -> Tensor:
    """What a block hands to the next: some return it with others, such as their attentions."""
    return output if isinstance(output, Tensor) else output[0]


def _relative_error(answer: Tensor, wanted: Tensor, mask: Tensor | None) -> Tensor:
    error = (answer.float() - wanted.float()).square().sum(-1)
    size = wanted.float().square().sum(-1)
    if mask is not None and mask.shape == error.shape:
        error, size = error[mask.to(error.device)], size[mask.to(error.device)]
    smallest = torch.finfo(torch.float32).smallest_normal
    together = error.sum() / size.sum().clamp(min=smallest)
    return (error / size.clamp(min=smallest)).mean() + together


def _orders(count: int) -> Iterator[int]:
    generator = torch.Generator().manual_seed(0)
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


def _block_around(model: nn.Module, owner: str) -> str:
    """The outermost member of a list of modules around `owner`; where there is none, itself."""
    parts = owner.split(".")
    for depth in range(1, len(parts)):
        if isinstance(model.get_submodule(".".join(parts[:depth])), nn.ModuleList):
            return ".".join(parts[: depth + 1])
    return owner


@contextmanager
def _own_gradients(params: Iterable[nn.Parameter]) -> Iterator[None]:
    """Afterwards they have the gradients that they had."""
    before = [(param, param.grad) for param in params]
    try:
        yield
    finally:
        for param, grad in before:
            param.grad = grad


class _TwoStates:
    """The weights of one block, dense and rounded; when closed it is rounded."""

    def __init__(self) -> None:
        self._dense: list[tuple[nn.Parameter, Tensor]] = []
        self._rounded: list[tuple[nn.Parameter, Tensor]] = []

    def begin(self, params: Iterable[nn.Parameter]) -> None:
        """With these, which are dense now."""
        self._dense = [(param, param.detach().clone()) for param in params]

    def show_dense(self) -> None:
        self._rounded = [(param, param.detach().clone()) for param, _ in self._dense]
        self._show(self._dense)

    def show_rounded(self) -> None:
        self._show(self._rounded)

    def close(self) -> None:
        self.show_rounded()

    @torch.no_grad()
    def _show(self, weights: Iterable[tuple[nn.Parameter, Tensor]]) -> None:
        for param, value in weights:
            param.copy_(value)
