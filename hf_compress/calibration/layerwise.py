"""Changing a model layer by layer, each from the inputs that the changed layers before it give it."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from hf_compress.calibration.batches import Batch
from hf_compress.calibration.layer_inputs import Accumulate, LayerInputs, Seen, eager_experts
from hf_compress.calibration.lockstep import called_once, is_inside, lockstep
from hf_compress.calibration.requirements import check_seen
from hf_compress.frozen import evaluating
from hf_compress.targets import Target, without_adapters


def layer_by_layer(
    model: nn.Module,
    batches: Sequence[Batch],
    targets: Sequence[Target],
    accumulate: Accumulate,
    *,
    desc: str,
) -> Generator[tuple[Target, list[Seen]], None, None]:
    """Yields each of `targets`, in the order of the forward, with what goes into its matrices over all
    batches: to be changed before the next is asked for, which sees the change.

    accumulate: see `LayerInputs`. desc: of the bar.

    All batches go through the model once, in evaluation mode; the modes of the modules are restored
    when the generator ends or is closed.

    Raises ValueError for a target that the first batch does not reach, before any is yielded; on the
    way, for batches of several kinds and for inputs that are not finite or cannot be seen.
    """
    with evaluating(model), eager_experts(model, targets):
        layers = called_once(model, batches[0], {target.owner for target in targets})
        decoder = decoder_around(model, layers)
        inputs = LayerInputs(batches, accumulate)
        with (
            closing(lockstep(model, batches, {*layers, *decoder})) as steps,
            logging.tqdm(total=len(layers), desc=desc, unit="layer") as bar,
        ):
            for name, calls in steps:
                if name in decoder:
                    inputs.enter_decoder(calls)
                    continue
                own = [t for t in targets if t.owner == name or is_inside(t.owner, name)]
                seen = inputs.of(model, name, calls, own)
                del calls  # what the forwards, going on, let go of
                for target in own:
                    check_seen(target.name, seen[target.name])
                    yield target, seen[target.name]
                bar.update()


def matrices(tensor: Tensor, target: Target) -> list[Tensor]:
    """Views (out, ...) of what lies as the weight of `target` does, one for each of stacked experts."""
    found = list(tensor.detach()) if target.stacked else [tensor.detach()]
    return [matrix.t() for matrix in found] if target.input_dim in (0, -2) else found


def decoder_around(model: nn.Module, layers: Sequence[str]) -> list[str]:
    """The name of the decoder, in a model that also has an encoder, if it holds any of `layers`."""
    inner = without_adapters(model)
    if not isinstance(inner, PreTrainedModel) or not inner.config.is_encoder_decoder:
        return []
    decoder = inner.get_decoder()
    names = [name for name, module in model.named_modules() if module is decoder]
    return [name for name in names if any(is_inside(layer, name) for layer in layers)]
