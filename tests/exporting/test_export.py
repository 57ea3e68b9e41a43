"""Exports are written, opened in their runtime, and say what the torch model says."""

import json

import pytest
import torch
from exporting.conftest import on_grids
from tiny import tiny_bert, tiny_llama, tiny_vit, tiny_wav2vec2

from hf_compress.cli.export import main
from hf_compress.cli.verify import main as verify
from hf_compress.example_inputs import example_inputs
from hf_compress.exporting.export import export_folder
from hf_compress.exporting.formats import load
from hf_compress.publishing.push import published_files
from hf_compress.publishing.validate import find_problems


def calibration(model, count=4):
    return [example_inputs(model, batch=2, length=12) for _ in range(count)]


def test_onnx_of_a_published_model_from_the_command_line(published, rows, capsys):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    main(
        ["--format", "onnx", "--model", str(published), "--dataset", rows, "--max_length", "16"]
        + ["--runs", "2", "--threads", "1"]
    )
    printed = capsys.readouterr().out
    place = published / "onnx"
    measured = json.loads((place / "measured.json").read_text())
    parity = measured["parity"]
    assert (parity["rows"], parity["predictions"], parity["agreement"]) == (20, 20, 1.0)
    assert parity["max_difference"] < 1e-5
    assert parity["torch"] == parity["exported"]
    assert set(measured["latency"]) == {"1", "16"}
    assert measured["latency"]["16"]["torch"]["inputs"]["input_ids"] == [16, 16]
    assert measured["latency"]["1"]["exported"]["threads"] == 1
    assert "agreement with torch 1.0000 of 20 predictions" in printed

    # What is there runs, for other sizes than the example's, and as a download.
    running = load(place, "onnx", threads=1)
    inputs = example_inputs(tiny_bert(), batch=3, length=7)
    with torch.no_grad():
        expected = tiny_bert().eval()(**inputs).logits
    torch.testing.assert_close(running(**inputs).logits, expected)

    report = json.loads((published / "report.json").read_text())
    assert report["exports"] == {"onnx": measured}
    assert find_problems(published) == []
    card = (published / "README.md").read_text()
    assert f"| onnx | {measured['bytes']:,} | 1.0000 | accuracy |" in card
    assert 'from_pretrained("tiny", subfolder="onnx")' in card
    assert {"onnx/model.onnx", "onnx/model.onnx.data"} <= set(published_files(published))
    with pytest.raises(SystemExit) as ended:
        verify([str(published), "--data", rows])
    assert ended.value.code == 0


@pytest.mark.parametrize(
    ("scheme", "stored"),
    [
        ({"bits": 4, "group_size": 16}, "INT4"),
        ({"bits": 8, "symmetric": False, "grid": "minmax"}, "INT8"),
    ],
)
def test_onnx_keeps_the_integers_of_a_training(scheme, stored, tmp_path):
    onnx_ir = pytest.importorskip("onnx_ir")
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    pytest.importorskip("compressed_tensors")
    model, grids = on_grids(tmp_path / "model", **scheme)
    place, measured = export_folder(tmp_path / "model", "onnx", length=12, runs=1)
    assert place.name == f"onnx-int{scheme['bits']}"
    assert measured["weights"].startswith(f"the integers of the training in {len(grids)} weights")
    assert measured["inputs"] == "random"
    assert measured["parity"]["agreement"] == 1.0
    # ONNX Runtime's kernel of 8 bits is a little off; the file is not.
    assert measured["parity"]["max_difference"] < 1e-5
    inputs = example_inputs(model, batch=3, length=7)
    with torch.no_grad():
        expected = model(**inputs).logits
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(place / "model.onnx", options)
    (found,) = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=0, atol=1e-7)
    graph = onnx_ir.load(place / "model.onnx").graph
    codes = {n: v for n, v in graph.initializers.items() if n.endswith("_codes")}
    assert codes.keys() == {f"{name}_codes" for name in grids}
    assert {value.dtype.name for value in codes.values()} == {stored}


def test_openvino_in_8_bits_is_calibrated(tmp_path):
    pytest.importorskip("openvino")
    pytest.importorskip("nncf")
    model = tiny_bert(hidden=64, layers=1)
    model.save_pretrained(tmp_path)
    batches = calibration(model)
    place, measured = export_folder(
        tmp_path, "openvino", bits=8, calibration=batches, length=12, runs=1
    )
    assert place.name == "openvino-int8"
    assert "rounded anew by NNCF" in measured["weights"]
    assert measured["parity"]["max_difference"] > 0  # integers
    assert measured["parity"]["agreement"] >= 0.5
    assert not (tmp_path / "README.md").exists()  # there was no card
    # Its weights are no pickle, and are published.
    assert "openvino-int8/openvino_model.bin" in set(published_files(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("make", [tiny_llama, tiny_vit, tiny_wav2vec2])
@pytest.mark.parametrize("format", ["onnx", "openvino", "executorch"])
def test_text_images_and_sound_in_every_runtime(format, make, tmp_path):
    pytest.importorskip({"onnx": "onnxruntime"}.get(format, format))
    make().save_pretrained(tmp_path)
    _, measured = export_folder(tmp_path, format, runs=1)
    assert measured["parity"]["agreement"] == 1.0
    assert measured["parity"]["max_difference"] < 1e-4


@pytest.mark.slow
def test_executorch_has_fixed_shapes_and_integers(published, rows, capsys):
    pytest.importorskip("executorch")
    main(
        ["--format", "executorch", "--model", str(published), "--dataset", rows, "--max_length", "16"]
        + ["--runs", "2"]
    )
    measured = json.loads((published / "executorch" / "measured.json").read_text())
    assert measured["parity"]["rows"] == 20  # each alone
    assert measured["parity"]["agreement"] == 1.0
    assert set(measured["latency"]) == {"1"}
    _, integers = export_folder(
        published, "executorch", bits=8, calibration=calibration(tiny_bert()), length=12, runs=1
    )
    assert 0 < integers["parity"]["max_difference"] < 1
    assert integers["bytes"] < measured["bytes"]
    assert find_problems(published) == []
