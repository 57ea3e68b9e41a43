"""Wrong inputs of quantized training, each told before the first step, and what is not wrong."""

import math
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from short import trainer
from tiny import tiny_bert, tiny_mixtral
from transformers import AutoModelForSequenceClassification

from hf_compress import QuantizationCallback, load_quantized, quantized, save_quantized
from hf_compress.quantization.grids import Grid
from hf_compress.targets import find_targets

BATCH = {"input_ids": torch.arange(5, 17)[None]}
STATIC = {"activations": 8, "calibration": [BATCH]}
QUERY = "bert.encoder.layer.0.attention.self.query.weight"

WHEN_MADE = [
    ({"bits": 1}, "`bits` is 1.* from 2 to 8"),
    ({"bits": 9}, "`bits` is 9.* from 2 to 8"),
    ({"bits": 4.5}, "`bits` is 4.5.* from 2 to 8"),
    ({"bits": True}, "`bits` is True.* from 2 to 8"),
    ({"bits": "8"}, "`bits` is '8'.* from 2 to 8"),
    ({"bits": (8, 1)}, "`bits` is 1.* from 2 to 8"),
    ({"bits": (4, 8)}, r"`bits` is \(4, 8\).*several that fall"),
    ({"bits": (8, 8)}, r"`bits` is \(8, 8\).*several that fall"),
    ({"bits": ()}, r"`bits` is \(\).*several that fall"),
    ({"group_size": 0}, "`group_size` is 0: .*2 or more"),
    ({"group_size": 1}, "`group_size` is 1: .*2 or more"),
    ({"group_size": 16.0}, "`group_size` is 16.0"),
    ({"group_size": "row"}, "`group_size` is 'row': .*'tensor' for all of a matrix"),
    ({"grid": "best"}, "`grid` is 'best'; allowed are .*'absmax'"),
    ({"grid": "median"}, "pass `symmetric=False`"),
    ({"grid": "absmax", "symmetric": False}, "for zero points take 'minmax'"),
    ({"start": 0.9, "end": 0.1}, r"`start` \(0.9\) is after `end`"),
    ({"start": 9, "end": 3}, r"`start` \(9\) is after `end`"),
    ({"start": -1}, "steps count from 0"),
    ({"end": 1.5}, r"`end` is 1.5.*lies in \[0, 1\]"),
    ({"end": math.nan}, r"`end` is nan.*lies in \[0, 1\]"),
    ({"end": True}, "`end` is True: pass a step"),
    ({"interval": 0}, "`interval` is 0: .*1 or more"),
    ({"interval": 2.5}, "`interval` is 2.5"),
    ({"activations": 1}, "`activations` is 1.* from 2 to 8"),
    ({"activations": 16}, "`activations` is 16.* from 2 to 8"),
    ({"activations": 8.0}, "`activations` is 8.0.* from 2 to 8"),
    ({"calibration": [BATCH]}, "pass `activations=8` with it"),
    ({"activations": 8, "calibration": []}, "`calibration` is empty"),
    ({"activations": 8, "calibration": [{}]}, "calibration batch 0 is empty"),
    ({"activations": 8, "calibration": [{"input_ids": torch.ones(0, 4)}]}, "batches without rows"),
    ({"activations": 8, "calibration": [{"pixel_values": torch.full((1, 2), math.nan)}]}, "holds NaN"),
    (
        {"activations": 8, "calibration": [BATCH | {"attention_mask": torch.zeros(1, 12)}]},
        "nothing but padding",
    ),
]


@pytest.mark.parametrize(("settings", "message"), WHEN_MADE)
def test_refused_when_made(settings, message):
    with pytest.raises(ValueError, match=message):
        QuantizationCallback(**({"bits": 4} | settings))


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (BATCH, "`calibration` is a dict: pass several batches"),
        (8, "`calibration` is a int"),
        ([[5, 6]], "batch 0 is a list, no mapping of tensors"),
        ([{"input_ids": [5, 6]}], "`input_ids` of calibration batch 0 is a list"),
    ],
)
def test_calibration_of_another_kind_is_refused_when_made(calibration, message):
    with pytest.raises(TypeError, match=message):
        QuantizationCallback(8, activations=8, calibration=calibration)


def frozen(model):
    model.bert.requires_grad_(False)
    return model


def with_value(value):
    def change(model):
        with torch.no_grad():
            model.get_parameter(QUERY)[3, 3] = value
        return model

    return change


def with_adapter(model):
    return get_peft_model(model, LoraConfig(target_modules=["query"], task_type="SEQ_CLS"))


def with_endless_inputs(model):
    with torch.no_grad():
        model.bert.embeddings.LayerNorm.bias[0] = math.inf
    return model


def with_empty_inputs(model):
    with torch.no_grad():
        model.bert.embeddings.LayerNorm.weight.zero_()
        model.bert.embeddings.LayerNorm.bias.zero_()
    return model


def in_bfloat16(model):
    return model.bfloat16()


BEFORE_THE_FIRST_STEP = [
    ({"targets": "atention"}, None, "near names: attention"),
    ({"ignore": ["bert"]}, None, "leave no weight"),
    ({"end": 21}, None, "ends at step 21.*ends at step 20"),
    ({"start": 19, "end": 0.5}, None, "starts at step 19, after its end"),
    ({"group_size": 24}, None, r"24 does not divide the 32 input features of bert.*`ignore`"),
    ({}, frozen, "frozen: it is not trained"),
    ({}, with_adapter, "frozen.*adapter"),
    ({}, with_value(math.nan), f"{QUERY} holds weights that are not finite"),
    ({}, with_value(math.inf), f"{QUERY} holds weights that are not finite"),
    ({"learn_scale": True}, in_bfloat16, "too coarse to learn a scale"),
    (STATIC, with_endless_inputs, "layer.0.attention.self.query inputs that are not finite: mend"),
    (STATIC, with_empty_inputs, "layer.0.attention.self.query nothing but zeros"),
]


@pytest.mark.parametrize(("settings", "change", "message"), BEFORE_THE_FIRST_STEP)
def test_refused_before_the_first_step(tmp_path, settings, change, message):
    model = change(tiny_bert()) if change else tiny_bert()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run = trainer(tmp_path, QuantizationCallback(4, **settings), model)
    with pytest.raises(ValueError, match=message):
        run.train()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_experts_have_no_inputs_to_quantize(tmp_path):
    model = tiny_mixtral()
    with pytest.raises(ValueError, match=r"stacked experts.*`ignore`"):
        trainer(tmp_path, QuantizationCallback(4, activations=8), model).train()
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_two_on_the_same_weights_are_refused(tmp_path):
    run = trainer(tmp_path, QuantizationCallback(4))
    run.add_callback(QuantizationCallback(8, symmetric=False))
    with pytest.raises(ValueError, match="already has a Quantizer"):
        run.train()


def test_packed_models_are_neither_trained_nor_exported(tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    tiny_bert(hidden=64).save_pretrained(tmp_path / "float")
    packed = load_quantized(tmp_path / "float", 4, AutoModelForSequenceClassification)
    with pytest.raises(ValueError, match=r"leave no weight.*packed as torch.uint8"):
        QuantizationCallback(4).dry_run(packed)
    grids = {QUERY: Grid(scale=torch.ones(64, 1), zero_point=None, bits=4)}
    with pytest.raises(ValueError, match="quantized already: copy the folder"):
        save_quantized(packed, tmp_path / "again", grids=grids)
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    ("grids", "format", "message"),
    [
        ({QUERY: None}, "onnx", "`format` is 'onnx'; allowed are"),
        ({}, "compressed-tensors", "`grids` is empty"),
        ({"bert.missing.weight": None}, "compressed-tensors", "has no bert.missing.weight"),
    ],
)
def test_wrong_exports_are_refused(tmp_path, grids, format, message):
    with pytest.raises(ValueError, match=message):
        save_quantized(tiny_bert(), tmp_path / "out", grids=grids, format=format)
    assert not (tmp_path / "out").exists()


def test_packages_that_are_missing_are_named_with_their_extra(tmp_path, monkeypatch):
    grids = {QUERY: Grid(scale=torch.ones(32, 1), zero_point=None, bits=4)}
    for package, format in (("compressed_tensors", "compressed-tensors"), ("torchao", "torchao")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ImportError, match=r'pip install "hf-compress\[quantization\]"'):
            save_quantized(tiny_bert(), tmp_path / "out", grids=grids, format=format)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match=r'pip install "hf-compress\[quantization\]"'):
        quantized(4)


@pytest.mark.parametrize("value", [0.0, 0.25])
@pytest.mark.parametrize(
    "settings", [{"learn_scale": True}, {"grid": "median", "symmetric": False, "group_size": 16}]
)
def test_weights_that_are_all_zero_or_all_equal_are_trained(tmp_path, value, settings):
    model = tiny_bert()
    with torch.no_grad():
        model.get_parameter(QUERY).fill_(value)
    callback = QuantizationCallback(2, **settings)
    trainer(tmp_path, callback, model, max_steps=3).train()
    assert all(param.isfinite().all() for param in find_targets(model).parameters.values())
    assert (callback.grids[QUERY].scale != 0).all()
