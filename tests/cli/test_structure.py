"""Structure removed by the command, on tiny models of two kinds."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_compress.cli.arguments import CalibrationArguments
from hf_compress.cli.calibrated import loaded
from hf_compress.cli.structure import main
from hf_compress.pruning.structure.removal import prune_structure


def classifying(classifier, output, *more):
    settings = ["--model", classifier, "--dataset", "reuters-r8", "--output_dir", str(output)]
    return [*settings, "--rows", "24", "--max_length", "16", *more]


def test_the_scores_are_those_of_the_labelled_rows(classifier, tmp_path):
    main(classifying(classifier, tmp_path / "new", "--ffn", "0.5"))
    arguments = CalibrationArguments(
        model=classifier, dataset="reuters-r8", rows=24, max_length=16, output_dir=str(tmp_path)
    )
    with loaded(arguments, "labels") as (model, _, batches):
        expected = prune_structure(model, ffn=0.5, calibration=batches).state_dict()
    written = load_file(tmp_path / "new" / "model.safetensors")
    assert all(torch.equal(written[name], expected[name]) for name in written)


def test_a_budget_is_met_and_told(classifier, tmp_path):
    def size(folder):
        return sum(4 * tensor.numel() for tensor in load_file(f"{folder}/model.safetensors").values())

    limit = size(classifier) - 50_000  # of which each of four layers has 34,000
    main(classifying(classifier, tmp_path / "new", "--max_bytes", str(limit)))
    assert size(tmp_path / "new") <= limit
    told = json.loads((tmp_path / "new" / "structure.json").read_text())
    assert told["settings"]["max_bytes"] == limit
    assert told["removed"].get("ffn") or told["removed"]["layers"] < 4


def test_hidden_features_of_a_language_model(language_model, texts, tmp_path):
    settings = ["--model", language_model, "--dataset", texts, "--task", "causal-lm", "--rows", "12"]
    settings += ["--max_length", "24", "--output_dir", str(tmp_path)]
    main([*settings, "--hidden", "0.25", "--score", "activation"])
    smaller = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert smaller.config.hidden_size == 24
    told = json.loads((tmp_path / "structure.json").read_text())
    assert told["found"]["parameters"] == smaller.num_parameters() == told["parameters_before"] * 3 // 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--speedup", "2", "--hidden", "0.5"), "a budget says what goes: leave out.*`hidden`"),
        (("--hidden", "0.5"), "LayerNorms subtract the mean.*What can be: ffn, layers"),
        (("--speedup", "2", "--ffn", "0.5"), "a budget says what goes: leave out"),
        (("--speedup", "0.5"), "above 1, such as 1.5"),
        (("--speedup", "2", "--max_bytes", "100"), "give one budget"),
        (("--max_bytes", "100"), "the nearest that was found"),
        ((), "nothing to remove"),
        (("--ffn", "50"), "For half pass 0.5"),
        (("--heads", "-0.5"), r"in \[0, 1\)"),
        (("--heads", "0.5"), "What can be: ffn, layers"),
        (("--layers", "5"), "keep 1 to 4"),
        (("--layers", "0"), "keep 1 to 4"),
        (("--experts", "0.5"), "experts"),
        (("--ffn", "0.5", "--round_to", "0"), "`round_to` is 0"),
        (("--ffn", "0.5", "--device_map", "disk"), "is offloaded: load the whole model to one device"),
    ],
)
def test_refusals(classifier, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        main(classifying(classifier, tmp_path, *change))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--score", "wanda"), "invalid choice: 'wanda'"),
        (("--layers", "2.5"), "invalid int value"),
        (("--ffn", "half"), "invalid float value"),
    ],
)
def test_wrong_types(classifier, tmp_path, change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        main(classifying(classifier, tmp_path, *change))
