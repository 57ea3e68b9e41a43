"""Loading in 8 and 4 bit with bitsandbytes, with the head left in float."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from transformers import AutoConfig, BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

# The names that transformers gives to task heads. "$" keeps a name from also meaning its children:
# `decoder` is the head of ModernBERT and half of T5.
HEADS = (
    "lm_head",
    "generator_lm_head",
    "proj_out",
    "embed_out",
    "lm_loss",
    "cls",
    "predictions",
    "generator_predictions",
    "discriminator_predictions",
    "lm_predictions",
    "pred_layer",
    "vocab_transform",
    "vocab_projector",
    "head",
    "decoder$",
    "dense$",
    "classifier",
    "pre_classifier",
    "classification_head",
    "score",
    "qa_outputs",
    "qa_classifier",
    "sequence_summary",
    "logits_proj",
    "output_projection",
    "answer_head",
    "projector",
    "pooler",
)
_BLOCK = 64  # weights that share one scale in bitsandbytes' 4-bit format


def quantized(
    bits: int = 4,
    *,
    compute_dtype: torch.dtype | None = None,
    storage_dtype: torch.dtype | None = None,
    skip: Sequence[str] | None = None,
) -> BitsAndBytesConfig:
    """The `quantization_config` of `from_pretrained` that suits this machine.

    8 bits is LLM.int8 (papers/2208.07339), 4 bits is NF4 with its scales quantized too
    (papers/2305.14314). On several ranks each loads onto its own device.

    compute_dtype: of the 4-bit matrix products; by default bfloat16 or float16, whichever the GPU
        has, and float32 on CPU.
    storage_dtype: what the 4-bit codes are stored as, uint8 by default. FSDP needs the dtype of the
        other weights.
    skip: names of the modules to keep in float, whole or their ending, by default the names of task
        heads (`HEADS`): an untrained head cannot be quantized, and a trained one must be trainable.
        `load_quantized` finds them in the model itself.

    On CPU a 4-bit model is safe to save and train only after `guard_cpu_kernels_`.

    Raises ValueError for other `bits` or a dtype with 8 bits, ImportError without bitsandbytes.
    """
    if type(bits) is not int or bits not in (4, 8):
        raise ValueError(f"`bits` must be 4 or 8, got {bits!r}: bitsandbytes has no other formats.")
    if isinstance(skip, str):
        raise ValueError(f"`skip` must be a list of module names, got the string {skip!r}.")
    _require_bitsandbytes()
    _device()
    skip = list(HEADS if skip is None else skip)
    if bits == 8:
        if compute_dtype is not None or storage_dtype is not None:
            raise ValueError(
                "`compute_dtype` and `storage_dtype` are for 4 bits: LLM.int8 multiplies in int8 and "
                "stores int8. Leave them out."
            )
        _warn_once_about_casts()
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype or _compute_dtype(),
        bnb_4bit_quant_storage=storage_dtype or torch.uint8,
        llm_int8_skip_modules=skip,
    )


def load_quantized(
    model_id: str,
    bits: int,
    auto_class: Any,
    *,
    compute_dtype: torch.dtype | None = None,
    skip: Sequence[str] = (),
) -> PreTrainedModel:
    """`auto_class.from_pretrained(model_id)` in 8 or 4 bit, on the device of this rank.

    model_id: path or hub id of a float checkpoint. auto_class: `AutoModelForCausalLM` and the like.
    skip: more modules to keep in float.

    Kept in float: what the class has outside its backbone, output embeddings and what is tied to
    them, layers that the checkpoint lacks (there is nothing to quantize yet), and in 4 bit on CPU,
    where the kernel is wrong for them, layers whose input size is no multiple of 64.

    Raises ValueError for other `bits`, for a checkpoint that is quantized already, and when nothing
    is left to quantize.
    """
    config = AutoConfig.from_pretrained(model_id)
    if hasattr(config, "quantization_config"):
        raise ValueError(
            f"{model_id!r} is quantized already: load it with {auto_class.__name__}.from_pretrained, "
            "and on CPU call `guard_cpu_kernels_` on it."
        )
    settings = quantized(bits, compute_dtype=compute_dtype)
    with torch.device("meta"):
        skeleton = auto_class.from_config(config)
    kept = {*skip, *head_layers(skeleton)}
    if bits == 4 and _device().type == "cpu":
        kept |= {name for name, layer in _layers(skeleton) if _in_features(layer) % _BLOCK}
    if all(name in kept for name, _ in _layers(skeleton)):
        raise ValueError(
            f"{model_id!r} has no layer to load in {bits} bit: all are heads, named in `skip`, or, in "
            f"4 bit on CPU, have an input size that is no multiple of {_BLOCK}."
        )
    while True:
        settings.llm_int8_skip_modules = sorted(kept)
        model, info = auto_class.from_pretrained(
            model_id,
            quantization_config=settings,
            device_map={"": _device()},
            output_loading_info=True,
        )
        missing = {name.rpartition(".")[0] for name in info["missing_keys"]}
        fresh = {name for name, _ in _layers(skeleton) if name in missing} - kept
        if not fresh:
            return guard_cpu_kernels_(model)
        # Left as they are, they hold no numbers that the quantized kernels could read.
        kept |= fresh


def head_layers(model: PreTrainedModel) -> list[str]:
    """Names of the linear layers of `model` outside its backbone, of its output, and tied ones."""
    backbone = set(model.base_model.modules())
    output = model.get_output_embeddings()
    embedded = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return [
        name
        for name, layer in _layers(model)
        # Some classes, T5ForQuestionAnswering among them, are their own backbone.
        if layer not in backbone or "." not in name or layer is output or id(layer.weight) in embedded
    ]


def guard_cpu_kernels_(model: nn.Module) -> Any:
    """Keeps the 4-bit layers of `model` off bitsandbytes' fused CPU kernel; returns `model`.

    On a CPU with AVX512-BF16 the first evaluation would repack their weights in place. From then on
    they save, dequantize and merge to wrong numbers, and give no gradient to what is below them.
    This costs the speed of that kernel. Elsewhere nothing changes.

    The effects were seen with bitsandbytes 0.50; the tests of this package check that the layers stay
    unpacked, and see the kernel itself only on such a CPU.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model


def _require_bitsandbytes() -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError(
            'Quantized loading needs bitsandbytes: pip install "hf-compress[quantization]"'
        )


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    # It also makes the rank's own device the current one, which is where transformers loads.
    return PartialState().device


def _compute_dtype() -> torch.dtype:
    if not torch.cuda.is_available():
        return torch.float32
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float16


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Linear | Conv1D]]:
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            yield name, module


def _in_features(layer: nn.Linear | Conv1D) -> int:
    return layer.weight.shape[0 if isinstance(layer, Conv1D) else 1]


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


def _warn_once_about_casts() -> None:
    # It warns that activations are cast to fp16 in every layer at every call.
    logging.getLogger("bitsandbytes.autograd._functions").addFilter(_ONCE)
