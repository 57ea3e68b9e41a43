"""Weights of models, bit by bit."""

import torch


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert torch.equal(ours[name], theirs[name]), name
