"""Keeping bitsandbytes right on a CPU, and quiet."""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import nn

from hf_compress.devices import is_host

BLOCK = 64  # weights that share one scale in bitsandbytes' 4-bit format


def guard_cpu_kernels_(model: nn.Module) -> Any:
    """Keeps the 4-bit layers of `model` off bitsandbytes' fused CPU kernel; returns `model`.

    On a CPU with AVX512-BF16 the first evaluation would repack their weights in place. From then on
    they save, dequantize and merge to wrong numbers, and give no gradient to what is below them; and
    outputs that are no multiple of 32 cannot be evaluated. This costs the speed of that kernel.
    Elsewhere nothing changes.

    The effects were seen with bitsandbytes 0.50. Call it right after loading.

    Raises ValueError where weights are repacked already, where this CPU's kernel decodes rows wrongly
    that end within a block of 64 weights, as AVX512 ones do, and, in 8 bits too, for layers to pack
    that are not in the checkpoint.
    """
    from bitsandbytes.nn import Linear4bit

    _check_packed(model)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, Linear4bit)}
    repacked = [name for name, layer in layers.items() if _is_repacked(layer)]
    if repacked:
        raise ValueError(
            f"{len(repacked)} layers, {repacked[0]} the first, were evaluated on this CPU before the "
            "guard, which has rounded their scales: load the model again, and call "
            "`guard_cpu_kernels_` on it at once."
        )
    odd = [
        name
        for name, layer in layers.items()
        if layer.in_features % BLOCK and is_host(layer.weight.device)
    ]
    if odd and not _decodes_any_row():
        raise ValueError(
            f"This CPU's kernel decodes {len(odd)} layers wrongly, {odd[0]} the first: their input "
            f"sizes are no multiple of {BLOCK}. Load the float checkpoint with `load_quantized`, which "
            "keeps them in float, or use a GPU."
        )
    for layer in layers.values():
        layer.support_avx512bf16_for_cpu = False
    return model


def has_fused_kernel() -> bool:
    """Whether this CPU has the kernel for which bitsandbytes repacks 4-bit weights: AVX512-BF16."""
    from bitsandbytes.functional import has_avx512bf16

    return bool(has_avx512bf16())


def warn_once_about_casts() -> None:
    # bitsandbytes warns that activations are cast to fp16 in every layer at every call.
    logging.getLogger("bitsandbytes.autograd._functions").addFilter(_ONCE)


def _check_packed(model: nn.Module) -> None:
    from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit

    # transformers makes such layers anew, with float weights that no packed kernel can read.
    fresh = [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, (Linear4bit, Linear8bitLt))
        and not isinstance(layer.weight, (Params4bit, Int8Params))
    ]
    if fresh:
        raise ValueError(
            f"{len(fresh)} layers, {fresh[0]} the first, are not in the checkpoint, so that there was "
            "nothing to pack: load with `load_quantized`, which keeps them in float, or name them in "
            "`quantized(skip=...)`."
        )


def _is_repacked(layer: Any) -> bool:
    # bitsandbytes adds the mark to the state when it repacks; a layer on "meta" has no state yet.
    state = layer.weight.quant_state
    return state is not None and vars(state).get("packing_format_for_cpu", False)


@functools.cache
def _decodes_any_row() -> bool:
    """Whether this CPU decodes rows right that end within a block: seen on the kernel itself."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = torch.randn(64, 48, generator=torch.Generator().manual_seed(0))
    codes, state = quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4")
    # Right is an error of 0.09, and 0.25 where scales of other blocks are used.
    return bool((dequantize_4bit(codes, state) - weight).norm() < 0.15 * weight.norm())


class _Once(logging.Filter):
    """Lets each message through once."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        new = message not in self._seen
        self._seen.add(message)
        return new


_ONCE = _Once()
