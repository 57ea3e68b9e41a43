"""The cards of model_cards/: as their reports have them, to the letter."""

import json
from pathlib import Path

import pytest

from hf_compress.publishing.card import render
from hf_compress.publishing.pictures import PICTURES
from hf_compress.publishing.validate import find_problems

CARDS = sorted((Path(__file__).parents[2] / "model_cards").glob("*/README.md"))


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.parent.name)
def test_a_card_is_what_its_report_says(card):
    report = json.loads((card.parent / "report.json").read_text())
    pictures = [name for name in PICTURES if (card.parent / name).is_file()]
    assert card.read_text() == render(report, pictures=pictures)
    assert find_problems(card.parent) == []
    assert report["name"] == card.parent.name


def test_the_cards_were_found():
    assert CARDS
