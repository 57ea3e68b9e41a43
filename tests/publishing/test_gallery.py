"""The cards of model_cards/: as their reports have them, to the letter."""

import json
import re
import shutil
from pathlib import Path

import pytest

from hf_compress.cli.arguments import CompressArguments
from hf_compress.cli.recipe import parse
from hf_compress.distillation.arguments import DistillationArguments
from hf_compress.publishing.card import render
from hf_compress.publishing.pictures import PICTURES
from hf_compress.publishing.validate import find_problems

ROOT = Path(__file__).parents[2]
CARDS = sorted((ROOT / "model_cards").glob("*/README.md"))


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.parent.name)
def test_a_card_is_what_its_report_says(card):
    report = json.loads((card.parent / "report.json").read_text())
    pictures = [name for name in PICTURES if (card.parent / name).is_file()]
    assert card.read_text() == render(report, pictures=pictures)
    assert find_problems(card.parent) == []
    assert report["name"] == card.parent.name


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.parent.name)
def test_a_card_with_one_digit_changed_is_caught(card, tmp_path):
    folder = shutil.copytree(card.parent, tmp_path / card.parent.name)
    text = card.read_text()
    digits = [found.start() for found in re.finditer(r"\d", text)]
    for place in digits[:: len(digits) // 12]:
        lie = f"{text[:place]}{(int(text[place]) + 1) % 10}{text[place + 1 :]}"
        (folder / "README.md").write_text(lie)
        assert find_problems(folder), text[place - 40 : place + 40]


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.parent.name)
def test_the_command_of_a_card_is_there_to_be_run(card):
    command = json.loads((card.parent / "report.json").read_text())["recipe"]["command"].split()
    assert command[0] == "python"
    assert (ROOT / command[1]).is_file()
    if "--config" in command:
        recipe = command[command.index("--config") + 1]
        parse(
            ["--config", str(ROOT / recipe), "--model", "."], CompressArguments, DistillationArguments
        )


def test_each_recipe_that_promises_a_card_has_one():
    recipes = (ROOT / "scripts" / "recipes").glob("*.yaml")
    promised = {recipe.stem for recipe in recipes if "model_cards/" in recipe.read_text()}
    assert {card.parent.name for card in CARDS} == promised
    assert len(promised) >= 5
