"""One-shot quantization: what lies on which grid, what stays, and what is refused."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from accelerate import disk_offload
from accelerate.hooks import remove_hook_from_submodules
from calibrations import ARCHITECTURES, build, text, tokens
from safetensors.torch import load_file
from tiny import tiny_bert, tiny_gpt2, tiny_llama, tiny_mixtral
from torch import nn

from hf_compress import prune_oneshot_, quantize_oneshot_, save_quantized
from hf_compress.calibration.second_order import add_gram
from hf_compress.constraint import constrain
from hf_compress.quantization.gptq import gptq, ordered_factor
from hf_compress.quantization.grids import fake_quantize, grouped
from hf_compress.quantization.quantizer import Quantizer
from hf_compress.quantization.schemes import GRIDS, Scheme, fit
from hf_compress.targets import find_targets

METHODS = pytest.mark.parametrize("method", ["rtn", "gptq"])


def quantize_(model, batch=None, **settings):
    """With the data that the method wants."""
    wanted = settings.get("method") == "gptq"
    return quantize_oneshot_(model, [batch or text()] if wanted else None, **settings)


def groups_of(target, group_size=None):
    return grouped(target.param.detach(), input_dim=target.input_dim, group_size=group_size)


def nearest(target, scheme):
    """The grid of a weight, and its groups rounded to it."""
    groups = groups_of(target, scheme.group_size)
    grid = fit(groups, scheme)
    return grid, fake_quantize(groups, grid)


@METHODS
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_weight_lies_on_its_grid_and_nothing_else_changes(name, method):
    model, batch = build(name)
    dense = copy.deepcopy(model)
    grids = quantize_(model, batch, bits=4, group_size=16, grid="minmax", method=method)
    targets, before = find_targets(model).targets, find_targets(dense).targets
    assert set(grids) == set(targets)
    for key, target in targets.items():
        grid, rounded = nearest(before[key], Scheme(bits=4, group_size=16, grid="minmax"))
        groups = groups_of(target, 16)
        assert grids[key].scale.equal(grid.scale)
        assert fake_quantize(groups, grid).equal(groups)
        assert groups.equal(rounded) is (method == "rtn"), key
    for key, tensor in model.state_dict().items():
        assert key in targets or tensor.equal(dense.state_dict()[key]), key


@METHODS
@pytest.mark.parametrize("group_size", [None, 8, "tensor"])
@pytest.mark.parametrize(
    ("grid", "symmetric"),
    [
        (grid, symmetric)
        for grid in GRIDS
        for symmetric in (True, False)
        if (grid, symmetric) not in (("median", True), ("absmax", False))
    ],
)
def test_every_grid(grid, symmetric, group_size, method):
    scheme = {"bits": 3, "group_size": group_size, "grid": grid, "symmetric": symmetric}
    model = tiny_gpt2(layers=1)
    before = find_targets(copy.deepcopy(model)).targets
    grids = quantize_(model, **scheme, method=method)
    for key, target in find_targets(model).targets.items():
        wanted, _ = nearest(before[key], Scheme(**scheme))
        assert grids[key].scale.equal(wanted.scale)
        assert (grids[key].zero_point is None) is symmetric
        groups = groups_of(target, group_size)
        assert fake_quantize(groups, wanted).equal(groups)


def test_each_layer_sees_the_layers_before_it_rounded():
    model = tiny_bert(layers=1)
    naive = copy.deepcopy(model).eval()
    quantize_(model, bits=3, method="gptq")
    batch = text()
    for key, target in find_targets(naive).targets.items():  # in the order of its forward
        seen = []
        hook = naive.get_submodule(target.owner).register_forward_pre_hook(
            lambda module, args, seen=seen: seen.append(args[0])
        )
        with torch.no_grad():
            naive(**batch)
            hook.remove()
            inputs = seen[0][batch["attention_mask"].bool()] if seen[0].dim() == 3 else seen[0]
            factor = ordered_factor(add_gram(None, inputs))
            target.param.copy_(gptq(target.param, *factor, nearest(target, Scheme(bits=3))[0]))
        torch.testing.assert_close(model.get_parameter(key), target.param, rtol=0, atol=0)


class Layer(nn.Module):
    """One linear layer, whose inputs are correlated and of different sizes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(48, 32)
        self.mix = torch.randn(48, 48) * torch.logspace(-1, 1, 48)

    def forward(self, x):
        return self.layer(x @ self.mix)


@pytest.mark.parametrize(
    ("bits", "sparsity", "at_most"),
    [(8, 0.0, 0.75), (4, 0.0, 0.75), (3, 0.0, 0.75), (2, 0.0, 0.9), (4, 0.5, 0.95), (3, 0.5, 0.95)],
)
def test_gptq_loses_less_than_rounding_to_nearest(bits, sparsity, at_most):
    dense = Layer()
    x, held_out = torch.randn(1000, 48).split(500)
    prune_oneshot_(dense, sparsity=sparsity, score="magnitude")
    lost = {}
    for method in ("rtn", "gptq"):
        model = copy.deepcopy(dense)
        quantize_(model, {"x": x}, bits=bits, group_size=16, method=method)
        with torch.no_grad():
            lost[method] = (model(held_out) - dense(held_out)).norm().item()
    assert lost["gptq"] < at_most * lost["rtn"]


@METHODS
def test_what_is_pruned_stays_pruned(method):
    model = tiny_bert()
    prune_oneshot_(model, [text()], sparsity=0.5)
    sparse = copy.deepcopy(model)
    quantize_(model, bits=4, method=method)
    zeros = {False: 0, True: 0}
    for key, target in find_targets(sparse).targets.items():
        before, after = target.param == 0, model.get_parameter(key) == 0
        assert after[before].all(), key
        zeros[False] += int(before.sum())
        zeros[True] += int(after.sum())
    entries = sum(target.param.numel() for target in find_targets(sparse).targets.values())
    assert zeros[False] == entries // 2
    # Small weights round to zero too.
    assert zeros[False] < zeros[True] < 0.6 * entries


@METHODS
def test_a_weight_of_zeros_stays_one_and_is_saved(method, tmp_path):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    model = tiny_bert(layers=1)
    key = "bert.encoder.layer.0.output.dense.weight"
    nn.init.zeros_(model.get_parameter(key))
    grids = quantize_(model, bits=4, method=method)
    assert model.get_parameter(key).eq(0).all()
    assert grids[key].scale.gt(0).all()
    save_quantized(model, tmp_path, grids=grids)


@METHODS
def test_experts_each_with_their_own_grid(method):
    model = tiny_mixtral(layers=1, experts=16)
    before = find_targets(copy.deepcopy(model)).targets
    # So few positions that most experts see none.
    batch = {"input_ids": tokens(rows=1)[:, :2]}
    scheme = {"bits": 4, "group_size": 8}
    grids = quantize_(model, batch, **scheme, method=method)
    key = "model.layers.0.mlp.experts.down_proj"
    grid, rounded = nearest(before[key], Scheme(**scheme))
    groups = groups_of(find_targets(model).targets[key], 8)
    assert grids[key].scale.equal(grid.scale)
    assert grids[key].scale.shape == (16, 32, 8)
    assert fake_quantize(groups, grid).equal(groups)
    as_nearest = [groups[expert].equal(rounded[expert]) for expert in range(16)]
    assert as_nearest.count(True) == 16 if method == "rtn" else 12 <= as_nearest.count(True) < 16


@METHODS
def test_offloaded_weights_are_rounded_in_turn(method, tmp_path):
    model = tiny_llama(layers=1)
    other = disk_offload(copy.deepcopy(model), tmp_path, execution_device="cpu")
    grids = quantize_(model, bits=4, grid="minmax", method=method)
    found = quantize_(other, bits=4, grid="minmax", method=method)
    remove_hook_from_submodules(other)  # loads all
    for key, tensor in model.state_dict().items():
        assert other.state_dict()[key].equal(tensor), key
    assert all(found[key].scale.equal(grid.scale) for key, grid in grids.items())


@METHODS
def test_bfloat16(method):
    model = tiny_llama(layers=1).to(torch.bfloat16)
    grids = quantize_(model, bits=4, group_size=16, symmetric=False, method=method)
    for key, target in find_targets(model).targets.items():
        assert target.param.dtype == grids[key].scale.dtype == torch.bfloat16
        assert fake_quantize(groups_of(target, 16), grids[key]).equal(groups_of(target, 16))


@METHODS
def test_only_what_is_named_in_a_model_left_as_it_was_found(method):
    model = tiny_llama()
    model.train()
    model.model.layers[1].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    pointers = {name: param.data_ptr() for name, param in model.named_parameters()}
    grids = quantize_(model, bits=4, targets="q_proj", ignore="layers.0", method=method)
    assert list(grids) == ["model.layers.1.self_attn.q_proj.weight"]
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name: param.data_ptr() for name, param in model.named_parameters()} == pointers
    assert not any(module._forward_pre_hooks for module in model.modules())


TAKEN_OVER = [
    # Of a grid that clips nothing the extreme codes are in use, so the same one is found again.
    ("rtn", {"grid": "mse"}, 1e-7),
    ("rtn", {"grid": "minmax", "symmetric": False}, 1e-7),
    ("rtn", {"grid": "percentile", "group_size": 16}, 1e-7),
    # Its largest weight, which is half a step off every code, has been moved, and the scale with it.
    ("rtn", {"grid": "absmax"}, 1 / 15),
    ("rtn", {"grid": "median", "symmetric": False}, 0.05),
    ("gptq", {"grid": "mse"}, 0.05),
]


@pytest.mark.parametrize(("method", "scheme", "at_most"), TAKEN_OVER, ids=str)
def test_a_training_takes_the_weights_over(method, scheme, at_most):
    model = tiny_bert()
    quantize_(model, bits=4, **scheme, method=method)
    selection = find_targets(model)
    before = {key: param.detach().clone() for key, param in selection.parameters.items()}
    quantizer = Quantizer(4, **scheme, targets=selection.targets)
    quantizer.at(0, 10)
    constrain(torch.optim.SGD(model.parameters(), lr=0.1), selection.parameters, quantizer)
    for key, param in selection.parameters.items():
        moved = (param - before[key]).norm() / before[key].norm()
        assert moved <= at_most * (1 + 1e-5), key


RELOAD = """
import sys
sys.modules["hf_compress"] = sys.modules["callbacks"] = None
import torch
from safetensors.torch import save_file
from transformers import BertForSequenceClassification

torch.set_num_threads(int(sys.argv[1]))
model = BertForSequenceClassification.from_pretrained("saved").eval()
with torch.no_grad():
    save_file({"logits": model(torch.arange(5, 29).view(2, 12)).logits}, "logits")
"""


def test_what_is_saved_loads_without_the_package_as_it_was_rounded(tmp_path):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    model = tiny_bert()
    grids = quantize_(model, bits=4, group_size=16, method="gptq")
    save_quantized(model, tmp_path / "saved", grids=grids)
    command = [sys.executable, "-c", RELOAD, str(torch.get_num_threads())]
    subprocess.run(command, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}, cwd=tmp_path)
    with torch.no_grad():
        logits = model.eval()(torch.arange(5, 29).view(2, 12)).logits
    assert load_file(tmp_path / "logits")["logits"].equal(logits)


DOWN = "model.layers.0.mlp.down_proj.weight"


def with_nan():
    model = tiny_llama(layers=1)
    model.get_parameter(DOWN).data[0, 0] = torch.nan
    return model


def packed():
    bnb = pytest.importorskip("bitsandbytes")
    model = tiny_llama(layers=1)
    for name, target in find_targets(model).targets.items():
        codes = bnb.nn.Int8Params(target.param.to(torch.int8), requires_grad=False)
        model.get_submodule(target.owner).weight = codes
        assert not model.get_parameter(name).is_floating_point()
    return model


class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, input_ids, attention_mask):
        return self.used(torch.ones(1, 8))


SETTINGS = [
    ({"bits": 1}, "`bits` is 1: pass a whole number of bits from 2 to 8"),
    ({"bits": 9}, "`bits` is 9: pass a whole number of bits from 2 to 8"),
    ({"bits": 4.0}, "`bits` is 4.0: pass a whole number"),
    ({"grid": "log"}, "`grid` is 'log'; allowed are"),
    ({"grid": "median"}, "pass `symmetric=False` with it"),
    ({"grid": "absmax", "symmetric": False}, "for zero points take 'minmax'"),
    ({"group_size": 24}, "`group_size` 24 does not divide the 32 input features"),
    ({"group_size": 0}, "`group_size` is 0: pass the number of input features"),
    ({"method": "awq"}, "`method` is 'awq'; there are rtn, gptq"),
    ({"targets": "query"}, "matches no weight"),
    ({"ignore": "query"}, "matches no weight"),
    ({"targets": "model.embed_tokens"}, "belongs to a Embedding: only Linear, Conv1D and stacked"),
    ({"method": "rtn", "calibration": [text()]}, "'rtn' reads no `calibration`.*method=\"gptq\""),
    ({"calibration": None}, "'gptq' needs `calibration`"),
    ({"calibration": []}, "`calibration` is empty"),
    ({"calibration": [{"inputs_embeds": torch.full((1, 4, 32), torch.nan)}]}, "holds NaN"),
    ({"damping": 0.0}, "`damping` is 0.0: it is a fraction above 0"),
]


@pytest.mark.parametrize(("settings", "message"), SETTINGS)
def test_refuses_settings_and_changes_nothing(settings, message):
    model = tiny_llama(layers=1)
    before = copy.deepcopy(model.state_dict())
    settings = {"bits": 4, "method": "gptq", "calibration": [text()]} | settings
    with pytest.raises(ValueError, match=message):
        quantize_oneshot_(model, settings.pop("calibration"), **settings)
    assert all(tensor.equal(before[key]) for key, tensor in model.state_dict().items())


@METHODS
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (with_nan, f"`{DOWN}` holds NaN or infinity"),
        (packed, "packed as torch.int8: load the model without quantization"),
        (lambda: tiny_llama().to("meta"), "is on the meta device: load the weights"),
    ],
)
def test_refuses_models(make, message, method):
    with pytest.raises(ValueError, match=message):
        quantize_(make(), bits=4, method=method)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Branch, "does not call `unused`, so its inputs cannot be seen"),
        (tiny_mixtral, "padding, which cannot be told apart inside the experts"),
    ],
)
def test_refuses_calibration_that_does_not_show_the_inputs(make, message):
    model = make()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        quantize_(model, bits=4, method="gptq")
    assert all(tensor.equal(before[key]) for key, tensor in model.state_dict().items())


def test_refuses_calibration_of_no_tensors():
    with pytest.raises(TypeError, match="pass several batches"):
        quantize_oneshot_(tiny_llama(), text(), bits=4, method="gptq")
