"""A card that is bad in one way is refused, with the place and the mend."""

import json
import re
import shutil

import pytest
from publishing.runs import read

from hf_compress.publishing.card import render
from hf_compress.publishing.metadata import check_license
from hf_compress.publishing.validate import find_problems, validate

# Where the card is changed, into what, and what is then said.
BREAKS = {
    "no front matter": ("---\n", "", "front matter: there is none"),
    "broken front matter": ("library_name: transformers", "library_name: [", "front matter: cannot"),
    "a list for a text": (
        "library_name: transformers",
        "library_name: [a]",
        "library_name: ['a'] must",
    ),
    "a text for a list": ("tags:\n", "tags: x\nold:\n", "tags: 'x' must be a list."),
    "a number for a tag": ("- hf-compress", "- 4", "tags: 4 must be text; put it in quotes."),
    "a local base": ("base_model: org/base", "base_model: ./base/x", "no 'org/name' of the Hub; name"),
    "no base": ("base_model: org/base\n", "", "base_model_relation: it needs a `base_model`"),
    "an unknown relation": ("relation: finetune", "relation: shrunk", "'shrunk' is none of finetune"),
    "another relation": ("relation: finetune", "relation: adapter", "'adapter' is not what was done"),
    "an unknown licence": ("license: apache-2.0", "license: mine", "license: `license` 'mine'"),
    "a licence without a name": ("license: apache-2.0", "license: other", "needs a `license_name`"),
    "a licence link to a file": (
        "license: apache-2.0",
        "license: other\nlicense_name: ours\nlicense_link: LICENSE",
        "license: `license_link` 'LICENSE' is not https",
    ),
    "a dataset on this machine": (
        "- counting",
        "- ./data/counting",
        "datasets: './data/counting' is no",
    ),
    "a language by its name": ("library_name:", "language: English\nlibrary_name:", "no ISO 639 code"),
    "another task": (
        "pipeline_tag: text-class",
        "pipeline_tag: image-class",
        "not what the report says",
    ),
    "another library": ("library_name: transformers", "library_name: peft", "library_name: 'peft' is"),
    "another base": (
        "base_model: org/base",
        "base_model: org/other",
        "'org/other' is not what the report",
    ),
    "another dataset": ("datasets:\n- counting", "datasets:\n- adding", "datasets: ['adding'] is not"),
    "a tag left out": ("- pruned\n", "", "tags: 'pruned', which the report says, is missing."),
    "a tag of another size": ("- pruned\n", "- pruned\n- 4-bit\n", "tags: '4-bit' has a number"),
    "another name in the index": (
        "model-index:\n- name: me/",
        "model-index:\n- name: you/",
        "it is not what",
    ),
    "a score in the index": ("      value: 0.", "      value: 7.", "model-index: accuracy is 7"),
    "an index without a task": ("      type: text-classification\n", "      name: x\n", "`task.type`"),
    "a mark": ("## Limits", "## Limits {{ x }}", "'{{' was left over; fill it in or take it out."),
    "a placeholder": ("## Limits", "[More Information Needed]", "'more information needed' was left"),
    "a path": ("## Limits", "see /home/me/x", "'/home/me/x' is a path of this machine; name it"),
    "a link": ("(layers.png)", "(lost.png)", "the link 'lost.png' is neither https nor a file"),
    "an insecure link": (
        "## Limits",
        "[x](http://example.org)",
        "'http://example.org' is neither https",
    ),
    "a score": ("| accuracy | ", "| accuracy | 9", "the report has"),
    "a size": ("| parameters | ", "| parameters | 1", ": parameters is '1"),
    "a missing row": ("| bytes on disk |", "| bytes |", "the row 'bytes on disk' is missing"),
    "a number in a sentence": (
        "of the targeted weights are",
        "of weights are",
        "is not what the report",
    ),
    "a sparsity in a sentence": (
        "Found in the files: 0.8",
        "Found in the files: 0.9",
        "not what the rep",
    ),
    "a setting": (
        "| temperature | 2.0 |",
        "| temperature | 3.0 |",
        "is not what the report says: '| temp",
    ),
    "hardware": (" passes, input", "0 passes, input", "is not what the report says: 'Latency is"),
    "a claim of one's own": (
        "## Limits",
        "It is 9 times faster.\n",
        "'It is 9 times faster.' states a",
    ),
    "a line left out": (
        "| seed | 42 |\n",
        "",
        "the report says '| seed | 42 |', and the card does not",
    ),
}


@pytest.fixture
def copied(published, tmp_path):
    """Of the published folder what a card is checked against."""
    for file in published.iterdir():
        if file.suffix in (".md", ".json", ".png"):
            shutil.copy(file, tmp_path)
    return tmp_path


@pytest.mark.parametrize("what", BREAKS)
def test_each_kind_of_badness_is_told_with_its_place(what, copied):
    before, after, message = BREAKS[what]
    card = copied / "README.md"
    text = card.read_text()
    assert before in text
    card.write_text(text.replace(before, after, 1))
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        validate(copied)
    assert re.search(r"\n- [\w ,/-]+: ", str(error.value))


def test_every_digit_of_the_card_counts(copied):
    card = copied / "README.md"
    text = card.read_text()
    digits = [place for place, sign in enumerate(text) if sign.isdigit()]
    assert len(digits) > 300
    for place in digits[::7]:
        other = str((int(text[place]) + 1) % 10)
        card.write_text(text[:place] + other + text[place + 1 :])
        assert find_problems(copied), text[text.rindex("\n", 0, place) : text.index("\n", place)]


def test_a_reader_may_add_words_but_no_numbers(copied):
    card = copied / "README.md"
    card.write_text(card.read_text() + "\n## Thanks\n\nTo all [who helped](https://example.org).\n")
    assert find_problems(copied) == []


def test_a_card_of_another_version_is_checked_by_its_tables(copied):
    report, card = read(copied), copied / "README.md"
    report["environment"]["versions"]["hf_compress"] = "0.0.9"
    (copied / "report.json").write_text(json.dumps(report))
    text = card.read_text().replace("hf_compress 0.", "hf_compress version 0.")
    card.write_text(text)
    assert find_problems(copied) == []
    card.write_text(text.replace("| parameters | ", "| parameters | 1"))
    assert len(find_problems(copied)) == 1


def test_what_a_user_tells_is_in_the_front_matter(copied):
    report = read(copied)
    report["license"] = {"id": "other", "name": "ours", "link": "https://example.org/terms"}
    report["language"] = ["en"]
    report["dataset"]["revision"] = "abc123"
    report["structure"] = {"num_hidden_layers": {"dense": 6, "compressed": 3}}
    report["evaluation"] = {"max_length": 40, "split": None}
    (copied / "report.json").write_text(json.dumps(report))
    pictures = [file.name for file in copied.glob("*.png")]
    (copied / "README.md").write_text(render(report, pictures=pictures))
    validate(copied)
    text = (copied / "README.md").read_text()
    for told in (
        "license_link: https://example.org/terms",
        "license_name: ours",
        "language:\n- en",
        "revision: abc123",
        "`num_hidden_layers` is 3, 6 in the dense model.",
        "Rows: max length 40.",
        "ours: https://example.org/terms",
    ):
        assert told in text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("my-own", None, None), "no identifier of the Hub"),
        (("other", None, None), "needs a `license_name`"),
        ((None, "ours", None), "`license_name` 'ours' needs license='other'"),
        (("mit", None, "LICENSE"), "`license_link` 'LICENSE' needs license='other'"),
        (("other", "ours", "/home/me/LICENSE"), "'/home/me/LICENSE' is not https"),
    ],
)
def test_licences_are_checked_before_any_work(given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check_license(*given)
