"""Loading in 8 and 4 bit with bitsandbytes, with the head left in float."""

from __future__ import annotations

import importlib.util
import inspect
import logging
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from torch import nn
from transformers import AutoConfig, BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module

from hf_compress.devices import is_host, own_device, short_dtype
from hf_compress.quantization.guard import (
    BLOCK,
    guard_cpu_kernels_,
    has_fused_kernel,
    warn_once_about_casts,
)
from hf_compress.quantization.heads import HEADS, head_layers, linear_layers

logger = logging.getLogger(__name__)

_HEAD = "head"
_SKIPPED = "named in `skip`"
_FRESH = "not in the checkpoint"


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
    storage_dtype: what the 4-bit codes are stored as: uint8, and under FSDP `compute_dtype`. FSDP
        shards float weights of one dtype only, so load the others in it too
        (`from_pretrained(dtype=...)`), and the adapters (`get_peft_model(autocast_adapter_dtype=False)`
        keeps PEFT from making them float32). It cannot shard LLM.int8.
    skip: names of the modules to keep in float, whole or their ending, by default the names of task
        heads (`HEADS`): an untrained head cannot be quantized, and a trained one must be trainable.
        `load_quantized` finds them in the model itself.

    On CPU a 4-bit model is safe to save and train only after `guard_cpu_kernels_`.

    Raises ValueError for other `bits`, a dtype with 8 bits or a `storage_dtype` that holds no codes,
    ImportError without bitsandbytes.
    """
    config = _settings(bits, compute_dtype, storage_dtype, skip)
    if bits == 4 and is_host(own_device()) and has_fused_kernel():
        logger.warning(
            "An evaluation on this CPU repacks 4-bit weights, so that they save, merge and train "
            "wrongly: load with `load_quantized`, or call `guard_cpu_kernels_(model)` right after "
            "from_pretrained."
        )
    return config


def load_quantized(
    model_id: str | PathLike[str],
    bits: int,
    auto_class: Any,
    *,
    config: PreTrainedConfig | None = None,
    compute_dtype: torch.dtype | None = None,
    storage_dtype: torch.dtype | None = None,
    skip: Sequence[str] = (),
) -> PreTrainedModel:
    """`auto_class.from_pretrained(model_id)` in 8 or 4 bit, on the device of this rank.

    model_id: path or hub id of a float checkpoint. auto_class: `AutoModelForCausalLM` and the like.
    config: instead of the checkpoint's, such as `AutoConfig.from_pretrained(model_id, num_labels=20)`.
    compute_dtype, storage_dtype: as in `quantized`; what is not packed is loaded in the
        `storage_dtype`, unless that is uint8.
    skip: more modules to keep in float: whole names, their ending, or a parent.

    Kept in float: what the class has outside its backbone, output embeddings and what is tied to
    them, layers that the checkpoint lacks (there is nothing to quantize yet), and in 4 bit on CPU,
    where the kernel may be wrong for them, layers whose input size is no multiple of 64. The log says
    which and why. The CPU's kernels are guarded (`guard_cpu_kernels_`).

    Raises ValueError for other `bits`, for a checkpoint that is quantized already, when an entry of
    `skip` matches no layer and when nothing is left to quantize; TypeError for a model instead of its
    path, and for a class that loads none.
    """
    _check_types(model_id, auto_class)
    settings = _settings(bits, compute_dtype, storage_dtype, skip)
    config = AutoConfig.from_pretrained(model_id) if config is None else config
    if hasattr(config, "quantization_config"):
        raise ValueError(
            f"{str(model_id)!r} is quantized already: load it with "
            f"{auto_class.__name__}.from_pretrained, and on CPU call `guard_cpu_kernels_` on it."
        )
    with torch.device("meta"):
        skeleton = auto_class.from_config(config)
    layers = dict(linear_layers(skeleton))
    kept = _kept_in_float(skeleton, layers, bits, skip)
    storage = getattr(settings, "bnb_4bit_quant_storage", torch.uint8)
    while True:
        if len(kept) == len(layers):
            raise ValueError(
                f"{str(model_id)!r} has no layer to load in {bits} bit. In float: {_listed(kept)}."
            )
        settings.llm_int8_skip_modules = sorted(kept)
        model, info = auto_class.from_pretrained(
            model_id,
            config=config,
            quantization_config=settings,
            device_map={"": own_device()},
            dtype=storage if storage.is_floating_point else "auto",
            output_loading_info=True,
        )
        missing = {name.rpartition(".")[0] for name in info["missing_keys"]}
        fresh = missing.intersection(layers).difference(kept)
        if not fresh:
            break
        # Left as they are, they hold no numbers that the quantized kernels could read.
        kept.update(dict.fromkeys(fresh, _FRESH))
    logger.log(
        logging.INFO if set(kept.values()) <= {_HEAD, _SKIPPED} else logging.WARNING,
        "%s: %d of %d linear layers in %d bit; in float: %s.",
        model_id,
        len(layers) - len(kept),
        len(layers),
        bits,
        _listed(kept) or "none",
    )
    return guard_cpu_kernels_(model)


def _check_types(model_id: Any, auto_class: Any) -> None:
    if not isinstance(model_id, (str, PathLike)):
        raise TypeError(
            f"`model_id` is a {type(model_id).__name__}: pass the path or hub id of its checkpoint. A "
            "model in memory goes through `save_pretrained` first."
        )
    if not (inspect.isclass(auto_class) and hasattr(auto_class, "from_pretrained")):
        raise TypeError(
            f"`auto_class` must be a class such as AutoModelForCausalLM, got {auto_class!r}."
        )


def _settings(
    bits: int,
    compute_dtype: torch.dtype | None,
    storage_dtype: torch.dtype | None,
    skip: Sequence[str] | None,
) -> BitsAndBytesConfig:
    if type(bits) is not int or bits not in (4, 8):
        raise ValueError(f"`bits` must be 4 or 8, got {bits!r}: bitsandbytes has no other formats.")
    if isinstance(skip, str):
        raise ValueError(
            f"`skip` must be a list of module names, got the string {skip!r}: pass [{skip!r}]."
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError(
            'Quantized loading needs bitsandbytes: pip install "hf-compress[quantization]"'
        )
    own_device()  # which becomes the current one: it is where transformers loads
    names = list(HEADS if skip is None else skip)
    if bits == 8:
        if compute_dtype is not None or storage_dtype is not None:
            raise ValueError(
                "`compute_dtype` and `storage_dtype` are for 4 bits: LLM.int8 multiplies in int8 and "
                "stores int8. Leave them out."
            )
        warn_once_about_casts()
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=names)
    for argument, dtype in (("compute_dtype", compute_dtype), ("storage_dtype", storage_dtype)):
        if dtype not in (None, torch.float32, torch.bfloat16, torch.float16) and (
            argument != "storage_dtype" or dtype != torch.uint8
        ):
            raise ValueError(
                f"`{argument}` must be torch.float32, bfloat16 or float16"
                f"{', or uint8' if argument == 'storage_dtype' else ''}, got {dtype!r}."
            )
    compute_dtype = compute_dtype or _compute_dtype()
    if storage_dtype is None:
        storage_dtype = compute_dtype if parse_flag_from_env("ACCELERATE_USE_FSDP") else torch.uint8
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        bnb_4bit_quant_storage=storage_dtype,
        llm_int8_skip_modules=names,
    )


def _kept_in_float(
    model: PreTrainedModel,
    layers: Mapping[str, nn.Linear | Conv1D],
    bits: int,
    skip: Sequence[str],
) -> dict[str, str]:
    """The reason for each layer that is known before the checkpoint is read, by its name."""
    kept = {}
    if bits == 4 and is_host(own_device()):
        for name, layer in layers.items():
            size = layer.weight.shape[0 if isinstance(layer, Conv1D) else 1]
            if size % BLOCK:
                kept[name] = f"input size {size} is no multiple of {BLOCK}"
    for entry in skip:
        named = [name for name in layers if not should_convert_module(name, [entry])]
        if not named:
            raise ValueError(
                f"`skip` entry {entry!r} matches none of the {len(layers)} linear layers of "
                f"{type(model).__name__}: pass whole names, endings or parents of names such as "
                f"{next(iter(layers), None)!r}."
            )
        kept.update(dict.fromkeys(named, _SKIPPED))
    kept.update(dict.fromkeys(head_layers(model), _HEAD))
    return kept


def _listed(kept: Mapping[str, str]) -> str:
    """The layers by their reasons, in one line."""
    names: dict[str, list[str]] = {}
    for name, reason in kept.items():
        names.setdefault(reason, []).append(name)
    return "; ".join(
        f"{', '.join(found[:3])}{f' and {len(found) - 3} more' if len(found) > 3 else ''} ({reason})"
        for reason, found in names.items()
    )


def _compute_dtype() -> torch.dtype:
    device = own_device()
    return torch.float32 if is_host(device) else short_dtype(device)
