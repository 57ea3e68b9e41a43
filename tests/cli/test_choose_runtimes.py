"""`choose --runtimes`: the dense model and the finalists, exported, run and told beside the others."""

import json

import pytest
import yaml

from hf_compress.cli.choose import main
from hf_compress.cli.errors import UserError
from hf_compress.publishing.validate import validate


def words(classifier, output, *runtimes, **more):
    settings = {
        "model": classifier,
        "dataset": "reuters-r8",
        "output_dir": output / "out",
        "space": output / "space.yaml",
        "max_drop": 100,
        "max_steps": 4,
        "max_length": 16,
        "max_train_rows": 48,
        "max_eval_rows": 24,
        "per_device_train_batch_size": 8,
        "use_cpu": True,
    } | more
    (output / "space.yaml").write_text(yaml.safe_dump({"layers": 2, "bits": 8}))
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    return [*flags, "--runtimes", *runtimes]


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["onnx-int8", "openvino-int8"])
def test_finalists_are_judged_in_other_runtimes_too(classifier, tmp_path, capsys, runtime):
    pytest.importorskip("onnxruntime" if runtime == "onnx-int8" else "nncf")
    flags = words(classifier, tmp_path, runtime)
    main(flags)
    out = tmp_path / "out"
    found = json.loads((out / "choice.json").read_text())
    names = [each["name"] for each in found["exported"]]
    assert names == ["dense", "2layers-8bit"]
    for name, each in zip(names, found["exported"], strict=True):
        place = (out / "dense" if name == "dense" else out / "finalists" / name) / runtime
        measured = json.loads((place / "measured.json").read_text())
        assert each["measured"]["bytes"] == measured["bytes"]
        assert each["measured"]["latency_ms"] > 0
        assert each["test"] == measured["parity"]["exported"]["accuracy"]
        assert measured["parity"]["rows"] == 24
        assert 0 <= each["validation"] <= 1
    printed = capsys.readouterr().out
    assert all(f"{name}, {runtime}  " in printed for name in names)
    # Of half the layers, in bytes of one each, on the disk.
    dense, smaller = (each["measured"]["bytes"] for each in found["exported"])
    assert smaller < dense
    validate(out / "winner")
    card = (out / "winner" / "README.md").read_text()
    assert f"2layers-8bit, {runtime}" in card  # in the table of the choice
    assert f'subfolder="{runtime}")' in card  # the winner's own export came along
    before = {p: p.stat().st_mtime_ns for p in out.rglob("measured.json")}
    main(flags)
    for path, when in before.items():
        if "winner" not in path.parts:
            assert path.stat().st_mtime_ns == when, path


@pytest.mark.parametrize(
    ("runtime", "change", "message"),
    [
        ("tflite", {}, "`runtimes` has 'tflite'; there are onnx, onnx-int8"),
        ("onnx", {"metric": "matthews"}, "compared by accuracy, f1, perplexity, not by matthews"),
    ],
)
def test_refusals(classifier, tmp_path, runtime, change, message):
    pytest.importorskip("onnxruntime")
    with pytest.raises(UserError, match=message):
        main(words(classifier, tmp_path, runtime, **change))
