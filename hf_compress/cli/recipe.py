"""Arguments from a recipe and from flags, for every command."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser


def parse(argv: list[str], *kinds: type) -> tuple[Any, ...]:
    """One filled instance of each dataclass in `kinds`, from `--config recipe.yaml` and flags; a flag
    wins over the recipe.

    Raises ValueError for an unknown or missing flag, a value of a wrong type, and for a recipe that is
    not there, is broken yaml, or has unknown keys.
    """
    known = {field.name for kind in kinds for field in fields(kind)}
    flags = list(argv)
    recipe: list[str] = []
    if "--config" in flags:
        place = flags.index("--config")
        if place + 1 == len(flags):
            raise ValueError("--config wants the path of a recipe.")
        recipe = _read_recipe(Path(flags[place + 1]), known)
        del flags[place : place + 2]
    # All the flags of a training in the usage would be a screenful before what they mean.
    usage = "hf-compress COMMAND [--config recipe.yaml] [--flag value ...]"
    parser = _Parser(kinds, usage=usage)  # type: ignore[arg-type]
    *filled, unknown = parser.parse_args_into_dataclasses(
        [*recipe, *flags], return_remaining_strings=True
    )
    if unknown:
        near = difflib.get_close_matches(unknown[0].lstrip("-"), known, n=3)
        names = f"near names: {', '.join(near)}" if near else "`--help` lists the known ones"
        raise ValueError(f"{unknown[0]!r} is no flag of this command; {names}.")
    return tuple(filled)


class _Parser(HfArgumentParser):
    """Without the usage, which with all the settings of a training is a screenful before the error."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}. `--help` lists the flags.")


class _Loader(yaml.SafeLoader):
    """Reads 2:4 as it stands, rather than as a number of base 60."""


def _whole_number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int | str:
    return node.value if ":" in node.value else loader.construct_yaml_int(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _whole_number)


def _read_recipe(path: Path, known: Iterable[str]) -> list[str]:
    """The recipe as flags, so that its values are checked as those of the command line are."""
    if not path.is_file():
        raise ValueError(f"no recipe at {path}.")
    try:
        recipe = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid yaml: {error}") from None
    if not isinstance(recipe, dict):
        raise ValueError(f"{path} must hold `name: value` lines, not {type(recipe).__name__}.")
    if unknown := sorted(str(key) for key in set(recipe) - set(known)):
        raise ValueError(f"{path} has unknown keys {unknown}. `--help` lists the known ones.")
    flags = []
    for key, value in recipe.items():
        if value is not None:
            flags += [f"--{key}", *_as_words(value)]
    return flags


def _as_words(value: Any) -> list[str]:
    if isinstance(value, list) and not any(isinstance(item, dict) for item in value):
        return [str(item) for item in value]
    return [json.dumps(value) if isinstance(value, (dict, list)) else str(value)]
