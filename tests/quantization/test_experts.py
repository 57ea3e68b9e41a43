"""Stacked experts are quantized as the Linear layers that they stand for, however they are stored."""

import copy

import pytest
import torch
from short import arguments
from tiny import language_rows, tiny_gpt_oss, tiny_llama4, tiny_mixtral
from torch import nn
from transformers import Trainer

from hf_compress import QuantizationCallback, quantize_oneshot_
from hf_compress.constraint import constrain
from hf_compress.quantization.quantizer import Quantizer
from hf_compress.targets import Target, find_targets

MODELS = {
    "mixtral": lambda: tiny_mixtral(layers=1),
    "gpt-oss": tiny_gpt_oss,
    "llama4": tiny_llama4,
}
# Whether a weight is (experts, in, out).
TRANSPOSED = {"mixtral": False, "gpt-oss": True, "llama4": True}
STEPS = 6

everywhere = pytest.mark.parametrize("name", MODELS)
every_size = pytest.mark.parametrize("group_size", [None, 8, "tensor"])


def stacked(model):
    found = {k: t for k, t in find_targets(model).targets.items() if t.param.dim() == 3}
    assert len(found) == 2
    return found


def linears(weight, transposed):
    """Each expert as a Linear layer of its own, (out, in)."""
    layers = []
    for expert in weight.detach():
        matrix = expert.t() if transposed else expert
        layer = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False)
        with torch.no_grad():
            layer.weight.copy_(matrix)
        layers.append(layer)
    return layers


def by_hand(matrix, group_size):
    """Symmetric min-max of 4 bits in each output feature, or in each group of neighbouring inputs of
    one; the scales (out, groups)."""
    rows = matrix.reshape(1, -1) if group_size == "tensor" else matrix
    rounded, scales = [], []
    for part in rows.split(group_size if isinstance(group_size, int) else rows.shape[1], dim=1):
        low, high = part.amin(1, keepdim=True), part.amax(1, keepdim=True)
        scale = torch.maximum(low / -8, high / 7)
        rounded.append((part * (1 / scale)).round().clamp(-8, 7) * scale)
        scales.append(scale)
    return torch.cat(rounded, 1).view_as(matrix), torch.cat(scales, 1)


@everywhere
@every_size
def test_rounding_is_that_of_each_experts_own_linear(name, group_size):
    model = MODELS[name]()
    before = {key: target.param.detach().clone() for key, target in stacked(model).items()}
    grids = quantize_oneshot_(model, bits=4, group_size=group_size, grid="minmax")
    for key, target in stacked(model).items():
        after = linears(target.param, TRANSPOSED[name])
        for expert, layer in enumerate(linears(before[key], TRANSPOSED[name])):
            rounded, scales = by_hand(layer.weight.detach(), group_size)
            assert after[expert].weight.equal(rounded), key
            scale = grids[key].scale[expert]
            assert (scale.t() if TRANSPOSED[name] else scale).equal(scales), key


@everywhere
@every_size
def test_training_is_that_of_each_experts_own_linear(name, group_size):
    settings = {"bits": (8, 3), "group_size": group_size, "grid": "mse", "symmetric": False}
    for key, target in stacked(MODELS[name]()).items():
        param = nn.Parameter(target.param.detach().clone())
        layers = linears(param, TRANSPOSED[name])
        alone = {f"{i}.weight": layer.weight for i, layer in enumerate(layers)}
        both = []
        for weights, dim in (({key: param}, target.input_dim), (alone, 1)):
            optimizer = torch.optim.AdamW(weights.values(), lr=1e-2)
            targets = {name: Target(name, weight, dim) for name, weight in weights.items()}
            quantizer = Quantizer(**settings, interval=2, end=4, targets=targets)
            quantizer.at(0, STEPS)
            constrain(optimizer, weights, quantizer)
            both.append((optimizer, quantizer))
        for step in range(STEPS):
            generator = torch.Generator().manual_seed(step)
            param.grad = torch.randn(param.shape, generator=generator)
            for layer, gradient in zip(layers, param.grad, strict=True):
                layer.weight.grad = (gradient.t() if TRANSPOSED[name] else gradient).contiguous()
            for optimizer, quantizer in both:
                quantizer.at(step + 1, STEPS)
                optimizer.step()
        for found, layer in zip(linears(param, TRANSPOSED[name]), layers, strict=True):
            assert found.weight.equal(layer.weight)


@everywhere
def test_the_callback_groups_along_the_inputs(name, tmp_path):
    model = MODELS[name]()
    before = copy.deepcopy(model.state_dict())
    callback = QuantizationCallback(3, group_size=8, grid="minmax")
    settings = arguments(tmp_path, max_steps=4, learning_rate=1e-2)
    Trainer(model, settings, train_dataset=language_rows(), callbacks=[callback]).train()
    for key, target in stacked(model).items():
        assert not target.param.equal(before[key])
        for layer in linears(target.param, TRANSPOSED[name]):
            groups = layer.weight.unflatten(1, (-1, 8)).flatten(0, 1)
            assert max(len(group.unique()) for group in groups) <= 8
    plan = callback.dry_run(model)
    for key, target in stacked(model).items():
        assert plan.quantized[key][1] == target.param.numel() // 8


def test_gptq_says_that_the_inputs_of_transposed_experts_are_not_seen():
    model = tiny_llama4()
    batch = {"input_ids": torch.arange(5, 29).view(2, 12)}
    with pytest.raises(ValueError, match=r"experts as \(in, out\), whose inputs.*needs no calibration"):
        quantize_oneshot_(model, [batch], bits=4, method="gptq")
