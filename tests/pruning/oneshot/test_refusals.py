"""Wrong inputs to one-shot pruning are told clearly, and nothing is changed."""

import copy

import pytest
import torch
from calibrations import text
from tiny import (
    tiny_llama,
    tiny_mixtral,
)
from torch import nn

from hf_compress.pruning.oneshot.prune import prune_oneshot_


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        return x @ self.layer.weight


class Sometimes(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x, short=False):
        x = self.first(x)
        return x if short else self.second(x)


def nan_batch():
    return {"inputs_embeds": torch.full((1, 4, 32), torch.nan)}


REFUSALS = [
    ({"sparsity": 80}, ValueError, "fraction"),
    ({"sparsity": 1.0}, ValueError, "fraction"),
    ({"sparsity": -0.1}, ValueError, "fraction"),
    ({"sparsity": "half"}, ValueError, "fraction"),
    ({"sparsity": None}, ValueError, "give `sparsity`"),
    ({"sparsity": {}}, ValueError, "empty dict"),
    ({"sparsity": {"Linear": 50}}, ValueError, "pass 0.8"),
    ({"sparsity": {"q_prj": 0.5}}, ValueError, "near names: q_proj"),
    ({"sparsity": {"Linear": 0.5, "q_proj": 0.9}}, ValueError, "special ones first"),
    ({"sparsity": {"Linear": 0.5}, "targets": "q_proj"}, ValueError, "leave `targets` out"),
    ({"sparsity": {"Linear": 0.5}, "pattern": "2:4"}, ValueError, "leave one of them out"),
    ({"sparsity": {"Linear": 0.5}, "pattern": "4x1"}, ValueError, "such as '2:4'"),
    ({"score": "obd"}, ValueError, "sparsegpt, wanda, magnitude"),
    ({"pattern": "4:2"}, ValueError, "such as '2:4'"),
    ({"pattern": "0:4"}, ValueError, "such as '2:4'"),
    ({"pattern": "block"}, ValueError, "such as '2:4'"),
    ({"pattern": 24}, ValueError, "such as '2:4'"),
    ({"pattern": "2:4", "sparsity": 0.75}, ValueError, "leave `sparsity` out"),
    ({"pattern": "2:5", "sparsity": None, "block_size": 100}, ValueError, "groups of 5 do not divide"),
    ({"pattern": "2:4", "block_size": 6}, ValueError, "multiple of 4"),
    ({"block_size": 0}, ValueError, "number of columns"),
    ({"damping": 0.0}, ValueError, "above 0"),
    ({"damping": float("nan")}, ValueError, "above 0"),
    ({"damping": "1 %"}, ValueError, "above 0, such as 0.01"),
    ({"calibration": None}, ValueError, "needs `calibration`"),
    ({"calibration": []}, ValueError, "empty"),
    ({"calibration": text()}, TypeError, "pass several batches"),
    ({"calibration": "text"}, TypeError, "pass several batches"),
    ({"calibration": 3}, TypeError, "pass several batches"),
    ({"calibration": [torch.ones(2, 4)]}, TypeError, "no mapping of tensors"),
    ({"calibration": [{"input_ids": [[1, 2]]}]}, TypeError, "no mapping of tensors"),
    ({"calibration": [nan_batch()]}, ValueError, "holds NaN"),
    ({"targets": "query"}, ValueError, "matches no weight"),
    ({"ignore": "query"}, ValueError, "matches no weight"),
    ({"targets": "model.embed_tokens"}, ValueError, "does not call|Linear"),
]


@pytest.mark.parametrize(("settings", "error", "message"), REFUSALS)
def test_refuses_and_changes_nothing(settings, error, message):
    model = tiny_llama()
    before = copy.deepcopy(model.state_dict())
    settings = {"sparsity": 0.5} | settings
    calibration = settings.pop("calibration", [text()])
    with pytest.raises(error, match=message):
        prune_oneshot_(model, calibration, **settings)
    for key, tensor in model.state_dict().items():
        assert tensor.equal(before[key])


@pytest.mark.parametrize(
    ("build", "batch", "message"),
    [
        (Functional, {"x": torch.ones(2, 8)}, "does not call `layer`"),
        (tiny_mixtral, text(), "padding, which cannot be told apart"),
        (lambda: tiny_llama().to("meta"), text(), "on the meta device"),
    ],
)
def test_refuses_models(build, batch, message):
    with pytest.raises(ValueError, match=message):
        prune_oneshot_(build(), [batch], sparsity=0.5)


def test_refuses_weights_that_are_nan():
    model = tiny_llama()
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="down_proj.weight` holds NaN"):
        prune_oneshot_(model, [text()], sparsity=0.5)


def test_refuses_inputs_that_overflow():
    model = tiny_llama()
    model.model.layers[0].mlp.up_proj.weight.data *= 1e30
    with pytest.raises(ValueError, match="inputs of .*down_proj.weight` are NaN or infinite"):
        prune_oneshot_(model, [text()], sparsity=0.5, score="wanda")


def test_refuses_batches_of_two_kinds():
    batches = [{"x": torch.ones(2, 8)}, {"x": torch.ones(2, 8), "short": torch.tensor(True)}]
    with pytest.raises(ValueError, match="take different ways"):
        prune_oneshot_(Sometimes(), batches, sparsity=0.5)
