"""Publishing what was trained on integer grids: the report and the card tell what is in the files."""

import subprocess
import sys

import pytest
import torch
from huggingface_hub import ModelCard
from publishing.runs import IDS, read, score, settings
from tiny import classification_rows, language_rows, tiny_bert, tiny_mixtral
from transformers import AutoModelForSequenceClassification, Trainer

from hf_compress import PruningCallback, QuantizationCallback, analyse, publish
from hf_compress.publishing.integers import inspect_integers
from hf_compress.targets import find_targets


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """On a grid of 4 bits, and half of the weights zero."""
    trainer = Trainer(
        tiny_bert(),
        settings(tmp_path_factory.mktemp("run"), steps=8),
        train_dataset=classification_rows(),
        eval_dataset=classification_rows(40, seed=1),
        compute_metrics=score,
        callbacks=[
            PruningCallback(0.5, interval=1, end=4),
            QuantizationCallback(4, group_size=16, grid="minmax", end=6),
        ],
    )
    trainer.train()
    return trainer


def published(trained, folder, format, **more):
    needed = {"compressed-tensors": "compressed_tensors", "torchao": "torchao"}
    if format in needed:
        pytest.importorskip(needed[format], reason=f"{format} is not installed")
    return publish(trained, folder=folder, format=format, **more)


@pytest.mark.parametrize("format", ["dense", "compressed-tensors", "torchao"])
def test_the_report_tells_the_integers_of_the_files(trained, tmp_path, format):
    folder = published(trained, tmp_path / "out", format, baseline=tiny_bert(seed=2))
    report, text = read(folder), (folder / "README.md").read_text()
    model, integers = trained.model, report["integers"]
    parameters = find_targets(model).parameters
    assert (integers["format"], integers["bits"], integers["weights"]) == (format, 4, len(parameters))
    # Counted as weights, whatever the files store.
    nonzeros = sum(int(p.count_nonzero()) for p in model.parameters())
    assert report["compressed"]["parameters"] == model.num_parameters()
    assert report["compressed"]["nonzeros"] == nonzeros
    assert report["audit"]["target_sparsity"] >= 0.5
    assert report["compressed"]["bytes"] == (folder / "model.safetensors").stat().st_size
    assert (report["compressed"]["bytes"] < 0.7 * report["dense"]["bytes"]) == (format != "dense")
    kinds = {kind["name"]: kind for kind in integers["kinds"]}
    query = kinds["bert.encoder.layer.N.attention.self.query"]
    assert (query["weights"], query["parameters"], query["per_scale"]) == (2, 2 * 32 * 32, 16)
    weights = [p for name, p in parameters.items() if name.endswith("query.weight")]
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    assert query["zeros"] == pytest.approx(zeros / query["parameters"])
    assert 0.5 < query["codes"] <= 1
    dense = analyse(tiny_bert(seed=2), bits=4, group_size=16)
    assert integers["errors"]["4"] == pytest.approx(dense.errors(4))
    assert f"| {query['error']:.4f} |" in text
    assert "| quantized | 13 weights of 4 bit |" in text
    assert "query.weight" not in text
    data = ModelCard.load(folder / "README.md").data.to_dict()
    assert {"pruned", "quantized", "4-bit"} <= set(data["tags"])
    assert (format in data["tags"]) == (format != "dense")
    assert (f"pip install {format}" in text) == (format != "dense")
    for picture in ("codes.png", "grid_errors.png", "weight_histograms.png"):
        assert f"({picture})" in text
        assert (folder / picture).is_file()
    script = f"""
import sys
sys.modules["hf_compress"] = None
import torch
from transformers import AutoModelForSequenceClassification
model = AutoModelForSequenceClassification.from_pretrained({str(folder)!r})
torch.save(model(torch.tensor({IDS.tolist()})).logits, {str(tmp_path / "logits")!r})
"""
    subprocess.run([sys.executable, "-c", script], check=True)
    with torch.no_grad():
        expected = model.eval()(IDS).logits
    # The weights are equal; where they lie in memory may change the last bits of a product.
    found = torch.load(tmp_path / "logits", weights_only=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_without_a_dense_model_no_error_is_told(trained, tmp_path):
    folder = publish(trained, folder=tmp_path / "out")
    report, text = read(folder), (folder / "README.md").read_text()
    assert report["integers"]["errors"] is None
    assert {kind["error"] for kind in report["integers"]["kinds"]} == {None}
    assert "grid_errors.png" not in text
    assert "which save no bytes and no time by themselves" in text


def test_files_off_the_grid_are_refused(trained, tmp_path):
    grids = next(
        c.grids for c in trained.callback_handler.callbacks if isinstance(c, QuantizationCallback)
    )
    model = tiny_bert()
    model.load_state_dict(trained.model.state_dict())
    name = next(iter(grids))
    with torch.no_grad():
        model.get_parameter(name)[0, 0] += 1e-4
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{name} is not on the grid that it was trained on"):
        inspect_integers(tmp_path, model, grids, format="dense", targets=[], baseline=None, chosen={})


def test_experts_are_counted_one_by_one(tmp_path):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    model = tiny_mixtral(layers=1)
    run = settings(tmp_path / "run", steps=2)
    callback = QuantizationCallback(4, group_size=16, grid="minmax")
    trainer = Trainer(model, run, train_dataset=language_rows(), callbacks=[callback])
    trainer.train()
    batch = {"input_ids": IDS}
    report = read(publish(trainer, folder=tmp_path / "out", format="compressed-tensors", inputs=batch))
    assert report["compressed"]["parameters"] == model.num_parameters()
    # In the files a matrix for each of the three projections of the four experts.
    assert sum("experts" in name for name in report["audit"]["tensors"]) == 12


def test_files_tell_the_grids_of_inputs_or_it_is_refused(tmp_path):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    rows = classification_rows(16).remove_columns("labels").with_format("torch")
    callback = QuantizationCallback(8, activations=8, calibration=[rows[:]], grid="minmax")
    trainer = Trainer(
        tiny_bert(),
        settings(tmp_path / "run", steps=2),
        train_dataset=classification_rows(),
        eval_dataset=classification_rows(40, seed=1),
        callbacks=[callback],
    )
    trainer.train()
    with pytest.raises(ValueError, match="rounds the inputs.*'dense'.*`remove_hooks"):
        publish(trainer, folder=tmp_path / "out")
    publish(trainer, folder=tmp_path / "out", format="compressed-tensors")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        rounding = trainer.model.eval()(IDS).logits
        assert loaded(IDS).logits.equal(rounding)
        callback.remove_hooks()
        assert not trainer.model(IDS).logits.equal(rounding)
    publish(trainer, folder=tmp_path / "out")


def test_a_format_needs_grids(tmp_path):
    with pytest.raises(ValueError, match="`format` is 'torchao', and no weights were trained on"):
        publish(tiny_bert(), folder=tmp_path / "out", format="torchao")
    assert list(tmp_path.iterdir()) == []
