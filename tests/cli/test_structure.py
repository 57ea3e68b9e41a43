"""Structure removed by the command, on tiny models of two kinds."""

import re

import pytest
import torch
from safetensors.torch import load_file

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


@pytest.mark.parametrize(
    ("change", "message"),
    [
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
