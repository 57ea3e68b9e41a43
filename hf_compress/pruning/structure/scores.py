"""How much a unit is worth, from its weights or from calibration data.

For Taylor, every unit is multiplied by a gate that is 1: the gradient of the gate is the sum of
w * grad over the columns that read the unit, and it exists for every row of the batch apart. Hidden
features have theirs behind each norm, where all columns read them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_compress.calibration.batches import Batch, check_calibration
from hf_compress.frozen import evaluating
from hf_compress.pruning.structure.anatomy import Units

UnitScore = Literal["taylor", "activation", "magnitude", "random"]
Scores = dict[str, Tensor]

# Their logits at a position are for the token after it. Whisper's decoder alone is listed too, but
# its loss does not shift the labels.
_SHIFTED = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()} - {"WhisperForCausalLM"}


def score_units(
    model: PreTrainedModel,
    units: Sequence[Units],
    *,
    score: UnitScore,
    calibration: Iterable[Batch] | None,
    seed: int,
) -> Scores:
    """A score (count,) for each of `units`, by their names; the lowest are worth least.

    score: "taylor", "activation", "magnitude" or "random" (of `seed`); see the functions below.
    calibration: batches as the model's forward takes them; only the first two scores use them. How
        rows are cut into batches makes no difference but rounding.

    The model runs in eval mode and is left as it was. Raises ValueError for an unknown score, missing
    or empty calibration data, batches without labels where a loss is needed, and scores that are not
    finite; TypeError for batches that are no mappings of tensors.
    """
    if score not in get_args(UnitScore):
        raise ValueError(f"`score` is {score!r}; allowed are {', '.join(get_args(UnitScore))}.")
    if score == "random":
        generator = torch.Generator().manual_seed(seed)
        return {u.name: torch.rand(u.count, generator=generator) for u in units}
    if score == "magnitude":
        scores = {u.name: magnitude(model, u) for u in units}
    elif calibration is None:
        raise ValueError(
            f"score={score!r} needs data: pass `calibration=`, batches as the model takes them, or "
            "score='magnitude'."
        )
    else:
        batches = (
            {key: value.to(model.device) for key, value in batch.items()}
            for batch in check_calibration(calibration)
        )
        with evaluating(model):
            scores = (taylor if score == "taylor" else activation)(model, units, batches)
    for name, values in scores.items():
        if not values.isfinite().all():
            raise ValueError(
                f"the {score} scores of {name} are not finite: there are NaN or infinite values in the "
                "model, or in what it computes. Load it in float32 or bfloat16."
            )
    return scores


@torch.no_grad()
def magnitude(model: nn.Module, units: Units) -> Tensor:
    """L2 norm of all weights that a unit owns."""
    if units.kind == "layers":
        layers = [model.get_submodule(name) for name in units.readers]
        squares = [sum(p.float().square().sum() for p in layer.parameters()) for layer in layers]
        return torch.stack([torch.as_tensor(s) for s in squares]).sqrt().cpu()
    return (
        sum((s.by_unit(s.param.float().square()) for s in units.slices), torch.zeros(())).sqrt().cpu()
    )


def taylor(model: PreTrainedModel, units: Sequence[Units], batches: Iterable[Batch]) -> Scores:
    """Sum over the rows of |d loss / d gate|: how the loss of the row would change, to first order,
    without the unit (Michel et al., arXiv:1905.10650; Molchanov et al., arXiv:1906.10771).

    The loss is summed over labels, so that each counts the same in any batch.
    """
    gates: Scores = {}
    scores: Scores = {u.name: torch.zeros(u.count, dtype=torch.float64) for u in units}

    def read(units: Units, place: int, hidden: Tensor) -> Tensor:
        gate = gates[units.name]  # (rows, count)
        parts = hidden.reshape(len(gate), -1, units.count, hidden.shape[-1] // units.count)
        return (parts * gate[:, None, :, None].to(hidden.dtype)).reshape(hidden.shape)

    def route(units: Units, weights: Tensor, chosen: Tensor) -> Tensor:
        gate = gates[units.name]
        by_token = gate.repeat_interleave(len(weights) // len(gate), 0)  # (tokens, experts)
        return weights * by_token.gather(1, chosen).to(weights.dtype)

    def pass_by(units: Units, place: int, before: Tensor, after: Tensor) -> Tensor:
        gate = gates[units.name][:, place].repeat_interleave(len(after) // len(gates[units.name]), 0)
        return before + gate[:, None, None].to(after.dtype) * (after - before)

    with _hooks(model, units, read=read, route=route, pass_by=pass_by):
        for batch in batches:
            items = items_of(model, batch)
            if items == 0:
                continue
            gates.update({u.name: _gate(batch, u.count, model.device) for u in units})
            with torch.enable_grad():
                loss = model(**batch).loss
                if loss is None:
                    raise ValueError(
                        "score='taylor' needs a loss: the calibration batches must carry labels, or "
                        "take score='activation'."
                    )
                gradients = torch.autograd.grad(loss * items, [gates[u.name] for u in units])
            for u, gradient in zip(units, gradients, strict=True):
                scores[u.name] += gradient.abs().sum(0).cpu().double()
    return scores


@torch.no_grad()
def activation(model: PreTrainedModel, units: Sequence[Units], batches: Iterable[Batch]) -> Scores:
    """How much a unit does on the data; tokens that an attention mask leaves out do not count.

    Neurons and heads: L2 norm of |w| * |x| over the columns that read the unit, where |x| is the norm
        of an input over all tokens (Wanda's score, arXiv:2306.11695, of the unit as a whole).
    Layers: sum over tokens of 1 - cos(input, output) (block influence, ShortGPT, arXiv:2403.03853).
    Experts: the sum of their routing weights.
    Hidden features: the sum over tokens and norms of their absolute value behind the norm (Minitron,
        arXiv:2407.14679).
    """
    squares: dict[str, list[Tensor]] = {}
    sums: Scores = {}
    batch: Batch = {}

    def read(units: Units, place: int, hidden: Tensor) -> Tensor:
        tokens = _tokens(hidden, units.masks[place], batch).float()
        if units.kind == "hidden":
            sums[units.name] += tokens.abs().sum(0).cpu().double()
            return hidden
        seen = tokens.square().sum(0).cpu().double()  # (features,)
        places = squares.setdefault(units.name, [torch.zeros_like(seen) for _ in units.readers])
        places[place] += seen
        return hidden

    def route(units: Units, weights: Tensor, chosen: Tensor) -> Tensor:
        one_hot = F.one_hot(chosen, units.count) * weights[..., None]  # (tokens, top k, experts)
        sums[units.name] += _tokens(one_hot.sum(1), units.masks[0], batch).sum(0).cpu().double()
        return weights

    def pass_by(units: Units, place: int, before: Tensor, after: Tensor) -> Tensor:
        change = 1 - F.cosine_similarity(before.float(), after.float(), dim=-1)
        tokens = _tokens(change[..., None], units.masks[place], batch)
        sums[units.name][place] += tokens.sum().cpu().double()
        return after

    for u in units:
        sums[u.name] = torch.zeros(u.count, dtype=torch.float64)
    with _hooks(model, units, read=read, route=route, pass_by=pass_by):
        for batch in batches:  # noqa: B007 (the hooks read it)
            model(**batch)
    for u in units:
        if u.name not in squares:
            continue
        for place, seen in zip(u.reading, squares[u.name], strict=True):
            weights = place.param.double().square().movedim(place.dim, 0).sum(1).cpu()  # (features,)
            sums[u.name] += (weights * seen).reshape(u.count, -1).sum(1)
        sums[u.name].sqrt_()
    return sums


@contextmanager
def _hooks(
    model: nn.Module,
    units: Sequence[Units],
    *,
    read: Callable[[Units, int, Tensor], Tensor],
    route: Callable[[Units, Tensor, Tensor], Tensor],
    pass_by: Callable[[Units, int, Tensor, Tensor], Tensor],
) -> Iterator[None]:
    """Let the functions see, and replace, what units hand on: read (units, place, input of a reader; of
    hidden features the output of a norm), route (units, routing weights and chosen experts, both
    (tokens, top k)), and pass_by (units, place, input and output of a layer). The place is the number
    of the module among `units.readers`."""

    def around_reader(u: Units, place: int) -> Callable[..., Any]:
        return lambda module, args: (read(u, place, args[0]), *args[1:])

    def behind_norm(u: Units, place: int) -> Callable[..., Any]:
        return lambda module, args, output: read(u, place, output)

    def around_router(u: Units) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            logits, weights, chosen = output
            return logits, route(u, weights, chosen), chosen

        return hook

    def around_layer(u: Units, place: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
            before = args[0] if args else kwargs["hidden_states"]
            if isinstance(output, Tensor):
                return pass_by(u, place, before, output)
            return (pass_by(u, place, before, output[0]), *output[1:])

        return hook

    handles = []
    for u in units:
        for place, name in enumerate(u.readers):
            module = model.get_submodule(name)
            if u.kind == "layers":
                handles.append(module.register_forward_hook(around_layer(u, place), with_kwargs=True))
            elif u.kind == "experts":
                handles.append(module.register_forward_hook(around_router(u)))
            elif u.kind == "hidden":
                handles.append(module.register_forward_hook(behind_norm(u, place)))
            else:
                handles.append(module.register_forward_pre_hook(around_reader(u, place)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _rows(batch: Batch) -> int:
    return len(next(iter(batch.values())))


def _gate(batch: Batch, count: int, device: torch.device) -> Tensor:
    return torch.ones(_rows(batch), count, device=device, requires_grad=True)


def items_of(model: PreTrainedModel, batch: Batch) -> int:
    """What the loss of the batch is a mean over."""
    labels = batch.get("labels")
    if labels is None or labels.dim() < 2 or labels.is_floating_point():
        return _rows(batch)
    if type(model).__name__ in _SHIFTED:
        labels = labels[:, 1:]
    return int((labels != -100).sum())


def _tokens(values: Tensor, mask_name: str | None, batch: Batch) -> Tensor:
    """Rows (tokens, features) of `values` (..., features) at the tokens that are no padding."""
    flat = values.reshape(-1, values.shape[-1])
    mask = batch.get(mask_name) if mask_name is not None else None
    if mask is None and mask_name == "decoder_attention_mask" and "labels" in batch:
        # Of which the decoder's input is made; none where the labels are of whole rows.
        mask = batch["labels"] != -100 if batch["labels"].dim() == 2 else None
    if mask is None:
        return flat
    if mask.numel() != len(flat):
        raise ValueError(
            f"`{mask_name}` of shape {tuple(mask.shape)} does not say which of the {len(flat)} tokens "
            "are padding: pass a mask of (rows, tokens), or none."
        )
    return flat[mask.reshape(-1).bool()]
