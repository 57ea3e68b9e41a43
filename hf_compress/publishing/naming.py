"""Names: of weights in files, which of them are alike, and what is a name of the Hub."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import torch
from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def written_as(model: PreTrainedModel, names: Iterable[str]) -> dict[str, list[str]]:
    """For each weight of `model` in `names` the tensors that `save_pretrained` writes it to.

    Mostly one of the same name. Some architectures are stored otherwise than they compute: the experts
    of a Mixtral, stacked in one weight of the model, are `experts.0.w1.weight` and so on in the files.

    Raises ValueError for a weight that is written together with another into one tensor.
    """
    written: dict[str, list[str]] = {}
    owners: dict[str, str] = {}
    for name in names:
        # On the meta device, since only the names matter: nothing is copied.
        shape = torch.empty_like(model.get_parameter(name), device="meta")
        written[name] = list(revert_weight_conversion(model, {name: shape}))
        for stored in written[name]:
            if owners.setdefault(stored, name) != name:
                raise ValueError(
                    f"{type(model).__name__} stores {owners[stored]} and {name} as one tensor, "
                    f"{stored}, so the zeros of each cannot be counted in the files. Leave one of them "
                    "dense, or publish the model without its trainer: no sparsity is claimed then."
                )
    return written


def general_name(name: str) -> str:
    """One name for weights that differ in numbers only, as those of one layer and the next."""
    return re.sub(r"\d+", "N", name.removesuffix(".weight"))


def cached_revision(repo_id: str | None) -> str | None:
    """The commit of a model of the Hub that was loaded here, where only one has ever been."""
    if repo_id is None:
        return None
    cache = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repo_id, repo_type="model"))
    commits = [path.name for path in (cache / "snapshots").glob("*")]
    return commits[0] if len(commits) == 1 else None


def hub_id(name: str | None) -> str | None:
    """`name` where it is an `org/name` of the Hub and not a folder here, else None."""
    if name is None or not _HUB_ID.fullmatch(name) or Path(name).exists():
        return None
    return name
