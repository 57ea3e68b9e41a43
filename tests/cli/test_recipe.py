"""Recipes and flags become arguments, or are refused."""

import re
from pathlib import Path

import pytest

from hf_compress.choosing.candidates import candidates_of
from hf_compress.cli.arguments import CompressArguments
from hf_compress.cli.choose import ChooseArguments, read_space
from hf_compress.cli.recipe import parse
from hf_compress.distillation.arguments import DistillationArguments
from hf_compress.samples import minilm

KINDS = (CompressArguments, DistillationArguments)
RECIPES = sorted((Path(__file__).parents[2] / "scripts" / "recipes").glob("*.yaml"))
NAMES = "model: m\ndataset: d\noutput_dir: o\n"


def test_flags_win_over_the_recipe(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(NAMES + "sparsity: 0.5\ntargets: [query, key]\n")
    compress, training = parse(["--config", str(recipe), "--sparsity", "0.25"], *KINDS)
    assert (compress.sparsity, compress.targets, compress.model) == (0.25, ["query", "key"], "m")
    assert training.output_dir == "o"


def test_a_pattern_is_no_number_of_base_60(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(NAMES + "pattern: 2:4\ninterval: 1_0\n")
    compress, _ = parse(["--config", str(recipe)], *KINDS)
    assert (compress.pattern, compress.interval) == ("2:4", 10)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("sparsty: 0.5", "unknown keys.*sparsty"),
        ("rows: 64", "unknown keys.*rows"),
        ("sparsity: [0.5", "not valid yaml"),
        ("- sparsity", "name: value"),
    ],
)
def test_bad_recipes_are_refused(tmp_path, recipe, message):
    (tmp_path / "r.yaml").write_text(recipe)
    with pytest.raises(ValueError, match=message):
        parse(["--config", str(tmp_path / "r.yaml")], *KINDS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sparsty", "0.5"], "'--sparsty' is no flag.*near names: sparsity"),
        (["--qqq"], "'--qqq' is no flag.*`--help` lists"),
        (["0.5"], "'0.5' is no flag"),
    ],
)
def test_unknown_flags_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        parse(["--model=m", "--dataset=d", "--output_dir=o", *words], *KINDS)


@pytest.mark.parametrize("words", [["--config"], ["--config", "none.yaml"]])
def test_a_missing_recipe(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="wants the path of a recipe|no recipe at none.yaml"):
        parse(words, *KINDS)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("sparsity: a lot", "--sparsity: invalid float value"),
        ("sparsity: true", "--sparsity: invalid float value: 'True'"),
        ("interval: 2.5", "--interval: invalid int value"),
        ("fraction: {first: 0.3}", "--fraction: invalid float value"),
        ("method: slow", "--method: invalid choice: 'slow'"),
    ],
)
def test_wrong_types(tmp_path, line, message):
    (tmp_path / "r.yaml").write_text(NAMES + line)
    with pytest.raises(ValueError, match=re.escape(message)):
        parse(["--config", str(tmp_path / "r.yaml")], *KINDS)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_the_recipes_hold_known_flags(recipe):
    chooses = recipe.name.startswith("choose-")
    kinds = (ChooseArguments if chooses else CompressArguments, DistillationArguments)
    arguments, _ = parse(["--config", str(recipe), "--model", "m"], *kinds)
    # How it is launched stands in it.
    command = "choose" if chooses else "compress"
    assert f"scripts/{command}.py --config scripts/recipes/{recipe.name}" in recipe.read_text()
    if chooses:
        arguments.limits()
        assert len(candidates_of(read_space(arguments.space))) >= 2


def test_a_teacher_may_be_a_packaged_model_too():
    flags = ["--model", "m", "--output_dir", "o", "--teacher", "all-minilm-l6-v2"]
    compress, _ = parse(flags, *KINDS)
    assert compress.teacher == minilm()


def test_a_list_of_spaces_is_one_value(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "{model: a, dataset: b, output_dir: c, max_drop: 1, space: [{layers: [3, 2]}, {bits: 8}]}"
    )
    arguments, _ = parse(["--config", str(recipe)], ChooseArguments, DistillationArguments)
    names = [each.name for each in candidates_of(read_space(arguments.space))]
    assert names == ["3layers", "2layers", "8bit"]
