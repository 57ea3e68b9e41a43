"""8- and 4-bit weights made float, and LoRAs merged into a packed copy, with what that cost."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import is_peft_available

from hf_compress.frozen import evaluating, snapshot
from hf_compress.quantization.guard import guard_cpu_kernels_

if TYPE_CHECKING:
    from peft import PeftModel

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Drift:
    """How far the logits of one model are from those of another.

    maximum, mean: of the absolute differences, in logits. agreement: share in [0, 1] of the
    predictions whose highest logit is that of the same class; 1 where there is one class.
    """

    maximum: float
    mean: float
    agreement: float


@dataclass(frozen=True)
class Requantized:
    """The merged model, in the bits of its base.

    drift: from the model with its adapter to the merged one: what rounding it again cost.
    learnt: from the base to the model with its adapter. A merge whose drift is as large has lost what
        was learnt: keep the adapter beside the base.
    """

    model: PreTrainedModel
    drift: Drift
    learnt: Drift


@torch.no_grad()
def merge_and_requantize(model: PeftModel, batches: Iterable[Batch]) -> Requantized:
    """Merges the active LoRAs (papers/2106.09685) into a copy of their 8- or 4-bit base.

    Each packed weight of the copy becomes float, takes its LoRA and is packed again as it was. That
    rounds it anew, so `Requantized.drift` compares the logits before and after on `batches`, and
    `Requantized.learnt` says what the adapter had changed. `model` stays as it is; memory for a second
    packed model is needed. The copy is frozen and in evaluation mode, holds what `modules_to_save`
    trained, saves plainly, and loads with `from_pretrained`.

    Merged weights that are adapted and merged again are rounded at every merge: merge once, from
    the base that was trained on.

    batches: inputs of the model, such as a list of dicts of tensors or a DataLoader. Logits at padding
        do not count.

    Raises TypeError for what is no PeftModel and for one batch instead of several; ValueError for
    adapters other than LoRA, ones that are merged in place already or hold NaN, a base that is not in
    bitsandbytes' formats, for no batches, and for a model without logits. On CPU it calls
    `guard_cpu_kernels_` on `model`, which raises too.
    """
    check_peft(model)
    _check_mergeable(model)
    if isinstance(batches, Mapping) or not isinstance(batches, Iterable):
        raise TypeError(
            f"`batches` is a {type(batches).__name__}: pass several, such as a list of dicts of "
            "tensors, or a DataLoader."
        )
    guard_cpu_kernels_(model)
    merged: Any = _merged_copy(model)
    drift, learnt = _Tally(), _Tally()
    with evaluating(model):
        for batch in batches:
            adapted = _logits(model, batch)
            drift.add(adapted, _logits(merged, batch))
            with _without_adapter(model):
                learnt.add(_logits(model, batch), adapted)
    if not drift.predictions:
        raise ValueError(
            "`batches` holds no prediction to compare: pass batches of what the model is meant for. A "
            "generator gives its batches only once."
        )
    return Requantized(merged, drift.drift(), learnt.drift())


def check_peft(model: Any) -> None:
    """Raises TypeError for what is no PeftModel."""
    if is_peft_available():
        from peft import PeftModel

        if isinstance(model, PeftModel):
            return
    raise TypeError(f"`model` is a {type(model).__name__}: pass the PeftModel that holds the LoRA.")


def dequantize_(model: PreTrainedModel, *, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Makes the packed layers of a bitsandbytes `model` float; returns `model`.

    dtype: of the weights that were packed, by default that of those that were not.

    Unlike `model.dequantize()` it also works after a save, gives GPT-2 back its Conv1D layers, and
    raises ValueError where an evaluation has repacked the weights (`guard_cpu_kernels_`), or where
    `model` is not in one of bitsandbytes' formats.
    """
    if not is_bitsandbytes(model):
        raise ValueError(
            f"This {type(model).__name__} is not in 8 or 4 bit of bitsandbytes: there is nothing to "
            "dequantize here."
        )
    guard_cpu_kernels_(model)
    conv1d = {name for name, module in model.named_modules() if _was_conv1d(module)}
    # Asked for no dtype, transformers takes the config's, which a save has made a string.
    model.dequantize(dtype=dtype or model.dtype)
    for name in conv1d:
        model.set_submodule(name, _conv1d(model.get_submodule(name)))
    return model


def is_bitsandbytes(model: PreTrainedModel) -> bool:
    """Whether `model` was loaded in 8 or 4 bit by bitsandbytes."""
    return hasattr(model.config, "quantization_config") and isinstance(
        model.config.quantization_config, BitsAndBytesConfig
    )


def _check_mergeable(model: PeftModel) -> None:
    from peft.tuners.lora import LoraModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not isinstance(model.base_model, LoraModel):
        raise ValueError(
            f"The adapter is a {type(model.base_model).__name__}: only LoRA merges into packed weights."
        )
    base: Any = model.get_base_model()
    if not is_bitsandbytes(base):
        raise ValueError(
            "The base is not in 8 or 4 bit of bitsandbytes: merge it with `model.merge_and_unload()`, "
            "and a sparse one with `merge_under_mask_`."
        )
    for name, layer in base.named_modules():
        if isinstance(layer, BaseTunerLayer) and layer.merged:
            raise ValueError(
                f"{name} is merged already, into packed weights in place, and unmerging would round "
                "them once more: load the base and the adapter again."
            )
    broken = [
        name for name, p in model.named_parameters() if "lora_" in name and not p.isfinite().all()
    ]
    if broken:
        raise ValueError(
            f"{len(broken)} tensors of the adapter, {broken[0]} the first, hold NaN or infinity: take "
            "an earlier checkpoint."
        )


def _merged_copy(model: PeftModel) -> PreTrainedModel:
    copied: Any = snapshot(model)
    with warnings.catch_warnings():
        # That rounding may change what is generated is what `Drift` measures.
        warnings.filterwarnings("ignore", "(?i)merge lora module to", UserWarning)
        return copied.merge_and_unload()


@contextmanager
def _without_adapter(model: PeftModel) -> Iterator[None]:
    trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        with model.disable_adapter():
            yield
    finally:
        # PEFT makes adapters trainable when it enables them again.
        for parameter, requires_grad in trained.items():
            parameter.requires_grad_(requires_grad)


def _logits(model: Any, batch: Batch) -> list[Tensor]:
    """Each of the model's logits as (predictions, classes), without those at padding."""
    batch = send_to_device(dict(batch), model.device)
    found = {key: value for key, value in model(**batch).items() if key.endswith("logits")}
    if not found:
        raise ValueError(f"{type(model).__name__} gives no logits: there is nothing to compare.")
    mask = batch.get("attention_mask")
    return [
        (
            value[mask.bool()]
            if mask is not None and value.dim() == 3 and value.shape[:2] == mask.shape
            else value.flatten(0, -2)
        ).float()
        for value in found.values()
    ]


@dataclass
class _Tally:
    """Differences summed up over batches."""

    maximum: float = 0.0
    total: float = 0.0
    numbers: int = 0
    agreeing: int = 0
    predictions: int = 0

    def add(self, before: list[Tensor], after: list[Tensor]) -> None:
        for ours, theirs in zip(before, after, strict=True):
            if not len(ours):
                continue
            difference = (ours - theirs).abs()
            self.maximum = max(self.maximum, float(difference.max()))
            self.total += float(difference.double().sum())
            self.numbers += difference.numel()
            self.agreeing += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
            self.predictions += len(ours)

    def drift(self) -> Drift:
        return Drift(self.maximum, self.total / self.numbers, self.agreeing / self.predictions)


def _was_conv1d(module: nn.Module) -> bool:
    """Whether it was a Conv1D before bitsandbytes packed it, as transformers notes it down."""
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    return isinstance(module, (Linear4bit, Linear8bitLt)) and module.source_cls is Conv1D


def _conv1d(linear: Any) -> Conv1D:
    # `dequantize` gives a Linear, whose file a model with Conv1D reads transposed, or not at all.
    layer = Conv1D(linear.out_features, linear.in_features)
    layer.weight = nn.Parameter(linear.weight.T.contiguous())
    layer.bias = nn.Parameter(linear.bias.detach())
    return layer
