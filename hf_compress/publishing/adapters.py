"""Adapters beside a base that they need: their files, and what a card has to tell of both."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, BitsAndBytesConfig, PreTrainedModel

from hf_compress.publishing.audit import Audit
from hf_compress.publishing.naming import general_name
from hf_compress.targets import without_adapters

if TYPE_CHECKING:
    from peft import PeftModel

CONFIG = "adapter_config.json"
_TOLD = ("peft_type", "r", "lora_alpha", "lora_dropout", "bias", "use_dora", "use_rslora")


def is_adapted(model: Any) -> bool:
    """Whether `model` is a base under adapters of PEFT."""
    return without_adapters(model) is not model


def check_adapters(model: Any, base_model: str | None) -> None:
    """Raises ValueError for adapters that nobody could load from a Hub: several of them, mixed ones,
    and those of a base without a name there."""
    if not is_adapted(model):
        return
    names, base = list(model.peft_config), without_adapters(model).config.name_or_path
    if names != ["default"]:
        raise ValueError(
            f"The model has the adapters {', '.join(names)}, and one of the name 'default' can be "
            "published: delete the others, or merge them first (model.merge_and_unload())."
        )
    if not base:
        raise ValueError(
            "The base under the adapters was made here, and they are nothing without it: save it, load "
            "it by `from_pretrained` and train adapters on that, or merge them (merge_and_unload())."
        )
    if base_model is None:
        raise ValueError(
            f"The base under the adapters is the folder {base!r}, which no one else has: pass its name "
            "on the Hub as `base_model`, or merge the adapters first (model.merge_and_unload())."
        )


def save_adapters(model: PeftModel, place: Path, base_model: str) -> None:
    """Writes the adapters and the config of their base, which has the names of its classes, to `place`.

    base_model: what they name as their base, in place of a folder of this machine.
    """
    model.save_pretrained(str(place))
    # Of the base; `quantization_config` in it would be taken for that of stored weights.
    config = copy.deepcopy(without_adapters(model).config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.save_pretrained(place)
    path = place / CONFIG
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["base_model_name_or_path"] = base_model
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def describe_adapters(model: Any, found: Audit) -> dict[str, Any] | None:
    """The part of `report.json` about adapters; None for a model without.

    `quantization` has the settings with which the base was loaded, as `BitsAndBytesConfig` takes them.
    """
    if not is_adapted(model):
        return None
    settings = json.loads(json.dumps(model.peft_config["default"].to_dict(), default=_listed))
    packing = getattr(model.config, "quantization_config", None)
    quantization = None
    if isinstance(packing, BitsAndBytesConfig):
        told = packing.to_diff_dict().items()
        quantization = {k: v for k, v in told if k != "quant_method" and not k.startswith("_")}
    return {
        **{name: settings[name] for name in _TOLD if settings.get(name) is not None},
        "targets": sorted(set(map(general_name, settings.get("target_modules") or ()))),
        "parameters": found.parameters,
        "quantization": quantization,
    }


def open_adapters(
    place: Path, kind: type[PreTrainedModel], base: str, quantization: dict[str, Any] | None
) -> Any:
    """The adapters in `place` on the base, loaded anew as the card of them says.

    kind: class of the base. base: its path or hub id. quantization: see `describe_adapters`.
    """
    from peft import PeftModel

    packing: dict[str, Any] = (
        {"quantization_config": BitsAndBytesConfig(**quantization)} if quantization else {}
    )
    config = AutoConfig.from_pretrained(place)
    loaded: Any = kind.from_pretrained(base, config=config, **packing)
    if quantization:
        from hf_compress.quantization.guard import guard_cpu_kernels_

        guard_cpu_kernels_(loaded)
    return PeftModel.from_pretrained(loaded, str(place)).eval()


def _listed(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)
