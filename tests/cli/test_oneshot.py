"""One-shot pruning by the command, on tiny models of two kinds."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_compress.cli.oneshot import check_groups, main
from hf_compress.publishing.audit import audit


def classifying(classifier, output, *more):
    settings = ["--model", classifier, "--dataset", "reuters-r8", "--output_dir", str(output)]
    return [*settings, "--rows", "24", "--max_length", "16", *more]


def speaking(language_model, texts, output, *more):
    settings = ["--model", language_model, "--dataset", texts, "--output_dir", str(output)]
    return [*settings, "--task", "causal-lm", "--rows", "12", "--max_length", "24", *more]


@pytest.fixture(scope="module")
def two_of_four(classifier, tmp_path_factory):
    output = tmp_path_factory.mktemp("out") / "new"
    main(classifying(classifier, output, "--pattern", "2:4"))
    return output


@pytest.fixture(scope="module")
def from_disk(language_model, texts, tmp_path_factory):
    """Half of the weights of attention, with the model on disk."""
    output = tmp_path_factory.mktemp("out")
    more = ["--score", "wanda", "--sparsity", "0.5", "--targets", "re:self_attn"]
    main(speaking(language_model, texts, output, *more, "--device_map", "disk"))
    return output


def test_each_group_of_four_keeps_two(two_of_four):
    tensors = load_file(two_of_four / "model.safetensors")
    for layer in range(4):
        weight = tensors[f"bert.encoder.layer.{layer}.intermediate.dense.weight"]
        assert ((weight.reshape(-1, 4) != 0).sum(1) == 2).all()


def test_what_was_found_is_told(classifier, tmp_path, capsys):
    main(classifying(classifier, tmp_path, "--score", "wanda", "--sparsity", "0.75"))
    told = json.loads((tmp_path / "oneshot.json").read_text())
    tensors = load_file(tmp_path / "model.safetensors")
    zeros = sum(int((tensor == 0).sum()) for tensor in tensors.values())
    total = sum(tensor.numel() for tensor in tensors.values())
    assert (told["found"]["parameters"], told["found"]["nonzeros"]) == (total, total - zeros)
    assert told["found"]["target_sparsity"] == 0.75
    assert set(told["pruned"]) == set(told["found"]["targets"])
    assert "classifier.weight" in told["left_dense"]
    assert told["calibration_rows"] == 24
    # No folder of this machine.
    assert told["settings"]["model"] in classifier.split("/")
    table = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()[-5:])
    assert table["files"].startswith("model.safetensors in ")
    assert f"{total:,}, {zeros / total:.2%}" in table["parameters"]
    assert table["pruned"].startswith("25 weights, 75.0000%")
    assert not list(tmp_path.glob(".offloaded-*"))


def test_where_the_weights_are_changes_nothing(language_model, texts, from_disk, tmp_path):
    more = ["--score", "wanda", "--sparsity", "0.5", "--targets", "re:self_attn"]
    main(speaking(language_model, texts, tmp_path, *more))
    here, there = (load_file(folder / "model.safetensors") for folder in (tmp_path, from_disk))
    assert here.keys() == there.keys()
    assert all(torch.equal(here[name], there[name]) for name in here)


def test_magnitude_reads_no_data(classifier, tmp_path):
    words = ["--model", classifier, "--output_dir", str(tmp_path), "--score", "magnitude"]
    main([*words, "--sparsity", "0.5"])
    dense, pruned = (load_file(f"{folder}/model.safetensors") for folder in (classifier, tmp_path))
    name = "bert.encoder.layer.0.output.dense.weight"
    kept = pruned[name] != 0
    assert torch.equal(pruned[name], dense[name] * kept)
    assert dense[name][kept].abs().min() >= dense[name][~kept].abs().max()


def test_a_file_that_is_not_two_of_four_is_found_out(tmp_path):
    fine = torch.tensor([[1.0, 0.0, 2.0, 0.0], [0.0, 0.0, 0.0, 3.0]])
    save_file({"a": fine, "b": fine.T.contiguous()}, tmp_path / "model.safetensors")
    check_groups(tmp_path, audit(tmp_path), {"a": 1, "b": 0}, (2, 4))
    with pytest.raises(ValueError, match="a in .* is not 1:4: 2 of 4 are left"):
        check_groups(tmp_path, audit(tmp_path), {"a": 1, "b": 0}, (1, 4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--sparsity", "80"), "pass 0.8"),
        ((), "give `sparsity`"),
        (("--pattern", "row", "--sparsity", "0.5"), "'unstructured', or 'N:M'"),
        (("--pattern", "2:4", "--sparsity", "0.3"), "means 0.5: leave `sparsity` out"),
        (("--pattern", "3:5"), "32 input features, which groups of 5 do not divide"),
        (("--pattern", "2:4", "--targets", "re:nothing"), "nothing"),
        (("--pattern", "2:4", "--text-columns", "words"), "--text-columns"),
    ],
)
def test_refusals(classifier, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        main(classifying(classifier, tmp_path, *change))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--score", "obd"), "invalid choice: 'obd'"),
        (("--sparsity", "half"), "invalid float value: 'half'"),
        (("--rows", "all"), "invalid int value: 'all'"),
        (("--task", "translation"), "invalid choice: 'translation'"),
    ],
)
def test_wrong_types(classifier, tmp_path, change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        main(classifying(classifier, tmp_path, *change))


def test_settings_of_training_are_unknown(tmp_path):
    (tmp_path / "r.yaml").write_text("pattern: 2:4\nlearning_rate: 0.1\n")
    with pytest.raises(ValueError, match=r"unknown keys \['learning_rate'\]"):
        main(["--config", str(tmp_path / "r.yaml"), "--model", "m", "--output_dir", "o"])
