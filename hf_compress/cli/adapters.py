"""LoRA adapters on a model in few bits."""

from __future__ import annotations

import importlib.util
from typing import Any

from transformers import AutoConfig

from hf_compress.cli.arguments import CompressArguments
from hf_compress.cli.tasks import AUTO_CLASSES

_KINDS = {"text-classification": "SEQ_CLS", "causal-lm": "CAUSAL_LM"}


def with_adapters(arguments: CompressArguments, names: list[str] | None) -> Any:
    """`model` in `load_bits`, frozen, with adapters of `lora_rank` on all its linear layers; a head
    for the classes `names` trains with them.

    Raises ValueError for other bits and tasks, ImportError without peft or bitsandbytes.
    """
    if importlib.util.find_spec("peft") is None:
        raise ImportError('adapters need peft: pip install "hf-compress[peft]".')
    from peft import LoraConfig, get_peft_model

    from hf_compress.quantization.bnb import load_quantized

    config: Any = AutoConfig.from_pretrained(arguments.model)
    if names is not None:
        config.id2label = dict(enumerate(names))
        config.label2id = {name: i for i, name in enumerate(names)}
    bits: Any = arguments.load_bits
    model = load_quantized(arguments.model, bits, AUTO_CLASSES[arguments.task], config=config)
    settings = LoraConfig(
        r=arguments.lora_rank,
        lora_alpha=2 * arguments.lora_rank,
        target_modules="all-linear",
        task_type=_KINDS[arguments.task],
    )
    return get_peft_model(model, settings)
