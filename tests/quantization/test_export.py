"""Export: what a process without this package loads is what was trained."""

import functools
import importlib.util
import json
import sys
from dataclasses import replace

import pytest
import torch
from quantization.reloads import INPUT, reload, rounded, tensor_bytes
from safetensors.torch import load_file
from tiny import classification_rows, language_rows, tiny_bert, tiny_gpt2, tiny_llama
from transformers import AutoModel, AutoModelForSequenceClassification, Trainer, TrainingArguments

from hf_compress import PruningCallback, QuantizationCallback, quantize_oneshot_
from hf_compress.quantization.activations import InputQuantizer
from hf_compress.quantization.calibrated import calibrated_grids
from hf_compress.quantization.export import save_quantized
from hf_compress.quantization.grids import Grid, fake_quantize, grouped
from hf_compress.targets import find_targets

pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")

TORCHAO = importlib.util.find_spec("torchao") is not None
needs_torchao = pytest.mark.skipif(not TORCHAO, reason="torchao is not installed")

tied_llama = functools.partial(tiny_llama, tie_word_embeddings=True)

QUERY = "bert.encoder.layer.0.attention.self.query.weight"


def texts(rows):
    """Two batches to calibrate with."""
    batch = rows(16, seed=7).remove_columns("labels").with_format("torch")
    return [batch[:8], batch[8:]]


FIXED = {"activations": 8, "calibration": texts(classification_rows)}
FIXED_LANGUAGE = {"activations": 8, "calibration": texts(language_rows)}

CASES = {
    "int8": (tiny_bert, {"bits": 8}),
    # As wide as the narrower of its layers.
    "int4 groups": (tiny_bert, {"bits": 4, "group_size": 32}),
    "int3 tensor": (tiny_bert, {"bits": 3, "group_size": "tensor"}),
    "int8 median": (tiny_bert, {"bits": 8, "symmetric": False, "grid": "median"}),
    "int4 zero points": (tiny_bert, {"bits": 4, "group_size": 16, "symmetric": False}),
    "int4 sparse": (tiny_bert, {"bits": 4}, 0.6),
    "int2 untied": (tiny_llama, {"bits": 2, "group_size": 16}),
    "int8 tied": (tied_llama, {"bits": 8}),
    "int8 fixed inputs": (tiny_bert, {"bits": 8} | FIXED),
    "int4 groups fixed inputs": (tiny_llama, {"bits": 4, "group_size": 16} | FIXED_LANGUAGE),
    "int8 median fixed inputs": (tiny_bert, {"bits": 8, "symmetric": False, "grid": "median"} | FIXED),
}

WITH_FLOAT_INPUTS = [case for case in CASES if "fixed inputs" not in case]


def train(folder, make, settings, sparsity=None):
    """The trained model, in evaluation mode, and its callback."""
    # Not the default grid, whose search takes longer than the training.
    model, callback = make(), QuantizationCallback(**({"grid": "minmax"} | settings))
    rows = classification_rows if make is tiny_bert else language_rows
    arguments = TrainingArguments(
        str(folder),
        max_steps=5,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    pruning = [] if sparsity is None else [PruningCallback(sparsity, interval=1, end=3)]
    Trainer(model, arguments, train_dataset=rows(32), callbacks=[callback, *pruning]).train()
    return model.eval(), callback


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """For each case the model, its callback, its folder, reloaded without hf_compress, and the logits
    by how it is loaded. The same in the other formats is in folders within."""
    root = tmp_path_factory.mktemp("exported")
    results = {}
    for name, case in CASES.items():
        model, callback = train(root / "training", *case)
        inputs = callback.input_grids
        save_quantized(model, root / name, grids=callback.grids, input_grids=inputs)
        for format in ("dense", "torchao")[: 1 + TORCHAO] if not inputs else ():
            save_quantized(model, root / name / format, grids=callback.grids, format=format)
        with torch.no_grad():
            trained = model(INPUT).logits
            callback.remove_hooks()
            logits = {"plain": trained, "dequantized": model(INPUT).logits}  # with float inputs
        results[name] = (model, callback, root / name, logits)
    folders = [str(root / case) for case in CASES]
    folders += [f"{root}/{case}/torchao" for case in WITH_FLOAT_INPUTS if TORCHAO]
    folders += [f"{root}/{case}/dense" for case in WITH_FLOAT_INPUTS]
    reload(root, folders)
    return results


@pytest.mark.parametrize("loaded", ["plain", "dequantized"])
@pytest.mark.parametrize("case", CASES)
def test_loads_without_the_package_as_it_was_trained(exported, case, loaded):
    model, callback, folder, logits = exported[case]
    found = load_file(folder / f"{loaded}.reloaded")
    assert logits[loaded].equal(found["logits"])
    assert logits[loaded].unique().numel() > 3
    assert logits["plain"].equal(logits["dequantized"]) is not bool(callback.input_grids)
    assert all(value.equal(found[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("case", CASES)
def test_the_file_holds_the_training_scales_and_is_as_small_as_planned(exported, case):
    model, callback, folder, _ = exported[case]
    tensors = load_file(folder / "model.safetensors")
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert settings["quant_method"] == "compressed-tensors"
    for name, grid in callback.grids.items():
        layer = name.removesuffix(".weight")
        scale = tensors[f"{layer}.weight_scale"]
        assert scale.flatten().equal(grid.scale.flatten())
        packed = callback.symmetric and not callback.input_grids
        codes = "weight_packed" if packed else "weight"
        assert tensors[f"{layer}.{codes}"].dtype == (torch.int32 if packed else torch.int8)
        if callback.input_grids:
            inputs = callback.input_grids[name]
            assert tensors[f"{layer}.input_scale"].equal(inputs.scale[None])
            assert tensors[f"{layer}.input_zero_point"].equal(inputs.zero_point[None].to(torch.int8))
    planned = callback.dry_run(model).packed_bytes
    if callback.bits == 4 and not packed:
        # Not packed: each code of the weights and zero points takes a byte instead of half of one.
        planned += sum(
            (model.get_parameter(name).numel() + (0 if callback.symmetric else grid.scale.numel())) // 2
            for name, grid in callback.grids.items()
        )
    assert tensor_bytes(folder) == pytest.approx(planned, rel=0.05)


@needs_torchao
@pytest.mark.parametrize("case", WITH_FLOAT_INPUTS)
def test_torchao_loads_what_was_trained(exported, case):
    model, callback, folder, logits = exported[case]
    found = load_file(folder / "torchao" / "plain.reloaded")
    assert all(value.equal(found[name]) for name, value in model.state_dict().items())
    # It multiplies by the scale after the product, where there is one for each output feature.
    bound = 1e-6 if callback.bits == 8 and callback.symmetric else 0
    torch.testing.assert_close(found["logits"], logits["plain"], rtol=0, atol=bound)
    tensors = load_file(folder / "torchao" / "model.safetensors")
    for name, grid in callback.grids.items():
        layer = name.removesuffix(".weight")
        assert tensors[f"{layer}._weight_scale"].equal(grid.scale)
        assert tensors[f"{layer}._weight_qdata"].dtype == torch.int8
    weights = sum(model.get_parameter(name).numel() for name in callback.grids)
    groups = sum(grid.scale.numel() for grid in callback.grids.values())
    # A byte instead of four for each code, four for each scale and one for each zero point.
    points = groups if callback.bits < 8 or not callback.symmetric else 0
    expected = model.num_parameters() * 4 - 3 * weights + 4 * groups + points
    assert tensor_bytes(folder / "torchao") == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("case", WITH_FLOAT_INPUTS)
def test_dense_loads_what_was_trained(exported, case):
    model, _, folder, logits = exported[case]
    found = load_file(folder / "dense" / "plain.reloaded")
    assert logits["plain"].equal(found["logits"])
    assert all(value.equal(found[name]) for name, value in model.state_dict().items())
    assert "quantization_config" not in json.loads((folder / "dense" / "config.json").read_text())


def test_tied_tables_stay_tied_and_are_saved_once(exported):
    for case, tied in (("int8 tied", True), ("int2 untied", False)):
        for folder in (exported[case][2] / format for format in ("", "torchao", "dense")):
            if folder.exists():
                assert ("lm_head.weight" in load_file(folder / "model.safetensors")) is not tied
                assert bool(load_file(folder / "plain.reloaded")["tied"]) is tied


def test_zeros_stay_zeros(exported):
    _, callback, folder, _ = exported["int4 sparse"]
    found = load_file(folder / "plain.reloaded")
    weights = torch.cat([found[name].flatten() for name in callback.grids])
    assert (weights == 0).float().mean() >= 0.6


def test_bfloat16_is_exact_too(tmp_path):
    model, grids = rounded(tiny_bert().to(torch.bfloat16), group_size=16)
    save_quantized(model, tmp_path, grids=grids)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert loaded(INPUT).logits.equal(model(INPUT).logits)
    assert all(loaded.get_parameter(name).equal(model.get_parameter(name)) for name in grids)


def test_the_backbone_loads_alone(tmp_path):
    model, grids = rounded(tiny_bert())
    kept = "bert.encoder.layer.0.output.dense.weight"
    del grids[kept]
    save_quantized(model, tmp_path, grids=grids)
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert loaded(INPUT).last_hidden_state.equal(model.bert(INPUT).last_hidden_state)


def test_the_model_is_left_alone_and_a_loaded_one_is_not_saved_again(tmp_path):
    model, grids = rounded(tiny_bert())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    save_quantized(model, tmp_path / "packed", grids=grids)
    after = model.state_dict()
    assert list(before) == list(after)
    assert all(value.equal(after[name]) for name, value in before.items())
    assert not hasattr(model.config, "quantization_config")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "packed")
    loaded(INPUT)
    with pytest.raises(ValueError, match="quantized already: copy the folder"):
        save_quantized(loaded, tmp_path / "again", grids=grids)
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_calibrated_without_training(tmp_path, dtype):
    model = tiny_bert().to(dtype)
    grids = quantize_oneshot_(model, bits=8)
    targets = find_targets(model).targets
    inputs = calibrated_grids(model, targets, texts(classification_rows))
    save_quantized(model, tmp_path, grids=grids, input_grids=inputs)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    InputQuantizer(model.eval(), targets, grids=inputs)
    with torch.no_grad():
        assert loaded(INPUT).logits.equal(model(INPUT).logits)


INPUTS_REFUSED = [
    (lambda grids: dict(list(grids.items())[1:]), f"{QUERY} is in one of .grids. and"),
    (lambda grids: grids | {QUERY: replace(grids[QUERY], bits=6)}, r"have \[6, 8\] bits, and must"),
    (lambda grids: grids | {QUERY: Grid(scale=torch.ones(32, 1), zero_point=None, bits=8)}, "32, 1"),
]


@pytest.mark.parametrize(("change", "message"), INPUTS_REFUSED)
def test_wrong_grids_of_inputs_are_refused(tmp_path, change, message):
    model, grids = rounded(tiny_bert(), bits=8)
    fixed = Grid(scale=torch.tensor(0.1), zero_point=torch.tensor(3.0), bits=8)
    with pytest.raises(ValueError, match=message):
        save_quantized(model, tmp_path, grids=grids, input_grids=change(dict.fromkeys(grids, fixed)))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", ["torchao", "dense"])
def test_formats_without_a_place_for_grids_of_inputs_are_refused(tmp_path, format):
    model, grids = rounded(tiny_bert(), bits=8)
    with pytest.raises(ValueError, match=f'"{format}" has no place.*`format="compressed-tensors"`'):
        save_quantized(model, tmp_path, grids=grids, input_grids=grids, format=format)
    assert not list(tmp_path.iterdir())


@needs_torchao
def test_torchao_takes_grids_of_several_kinds_and_leaves_the_model_alone(tmp_path):
    model, grids = rounded(tiny_bert().to(torch.bfloat16), group_size=16)
    _, finer = rounded(tiny_bert().to(torch.bfloat16), bits=8)
    kept = "bert.encoder.layer.0.output.dense.weight"
    del grids[kept]
    with torch.no_grad():
        groups = grouped(model.get_parameter(QUERY), input_dim=1, group_size=None)
        groups.copy_(fake_quantize(groups, finer[QUERY]))
    save_quantized(model, tmp_path, grids=grids | {QUERY: finer[QUERY]}, format="torchao")
    assert not hasattr(model, "hf_quantizer")
    assert not hasattr(model.config, "quantization_config")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(INPUT).logits, model(INPUT).logits, rtol=0, atol=1e-2)
    assert type(loaded.get_parameter(kept).data) is torch.Tensor
    assert all(
        loaded.get_parameter(name).dequantize().equal(model.get_parameter(name)) for name in grids
    )
    with pytest.raises(ValueError, match="quantized already: copy the folder"):
        save_quantized(loaded, tmp_path / "again", grids=grids, format="torchao")


@needs_torchao
def test_several_files_of_torchao_load_together(tmp_path, monkeypatch):
    model, grids = rounded(tiny_bert())
    save = type(model).save_pretrained
    monkeypatch.setattr(
        type(model), "save_pretrained", functools.partialmethod(save, max_shard_size="20KB")
    )
    save_quantized(model, tmp_path, grids=grids, format="torchao")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert loaded(INPUT).logits.equal(model(INPUT).logits)


def test_dense_is_plain_save_pretrained(tmp_path):
    model, grids = rounded(tiny_gpt2())
    save_quantized(model, tmp_path / "ours", grids=grids, format="dense")
    model.save_pretrained(tmp_path / "plain")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()


def moved(model, grids):
    with torch.no_grad():
        model.get_parameter(QUERY)[3, 3] += 1e-4
    return model, grids


def of_several_kinds(model, grids):
    _, finer = rounded(tiny_bert(), bits=8)
    return model, grids | {QUERY: finer[QUERY]}


def of_another_shape(model, grids):
    return model, grids | {QUERY: Grid(scale=torch.ones(8, 1), zero_point=None, bits=4)}


def shared(model, grids):
    one, other = (layer.attention.self for layer in model.bert.encoder.layer)
    other.query.weight = one.query.weight
    return model, grids


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (moved, f"{QUERY} is not on its grid: something changed it"),
        (of_several_kinds, "of 2 kinds .4 bits.*8 bits.*must be of one"),
        (of_another_shape, r"query.weight is 32x32.*scales of shape \(8, 1\)"),
        (shared, "query.weight is shared with another layer"),
        (lambda model, grids: (model, {}), "`grids` is empty"),
        (lambda model, grids: (model.bert, grids), "BertModel has no bert.encoder.*not a part"),
    ],
)
def test_refused_before_anything_is_written(tmp_path, change, message):
    model, grids = change(*rounded(tiny_bert()))
    with pytest.raises(ValueError, match=message):
        save_quantized(model, tmp_path / "folder", grids=grids)
    assert not (tmp_path / "folder").exists()


def test_wrong_arguments_are_refused(tmp_path, monkeypatch):
    model, grids = rounded(tiny_bert())
    with pytest.raises(
        ValueError, match="`format` is 'gguf'; allowed are 'compressed-tensors', 'torchao', 'dense'"
    ):
        save_quantized(model, tmp_path, grids=grids, format="gguf")
    with pytest.raises(TypeError, match="is a Linear: pass the transformers model"):
        save_quantized(model.classifier, tmp_path, grids=grids)
    for package, format in (("compressed_tensors", "compressed-tensors"), ("torchao", "torchao")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ImportError, match=f'"{format}" needs.*hf-compress.quantization'):
            save_quantized(model, tmp_path, grids=grids, format=format)
    assert not list(tmp_path.iterdir())
