"""Pictures show what there is, and none is drawn of what was not measured."""

import torch

from hf_compress.publishing.pictures import (
    CHOICE,
    PICTURES,
    draw_all,
    draw_bits,
    draw_history,
    draw_layers,
    draw_trade,
    draw_weights,
)


def side(accuracy):
    return {"bytes": 4_000_000, "nonzeros": 1_000_000, "metrics": {"accuracy": accuracy}}


def report(**more):
    told = {
        "metric": "accuracy",
        "dense": side(0.9),
        "compressed": side(0.8),
        "history": [{"step": step, "loss": 1 / step, "sparsity": step / 9} for step in (1, 2, 3)],
        "audit": {"tensors": {"a": {"zeros": 1, "numel": 4}}, "targets": ["a"]},
        "recipe": {"methods": [{"quantized": {"a": 4, "b": 8}}, {}]},
    }
    return told | more


def test_each_picture_is_drawn_where_there_is_something_to_show(tmp_path):
    before, after = [torch.randn(8, 8)], [torch.randn(8, 8) * (torch.rand(8, 8) < 0.5)]
    drawn = draw_all(report(), before, after, tmp_path)
    assert drawn == [name for name in PICTURES[:6] if name != CHOICE]
    for name in drawn:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_nothing_is_drawn_of_what_was_not_measured(tmp_path):
    bare = {"audit": {"tensors": {}, "targets": []}, "recipe": {"methods": []}, "history": []}
    assert draw_all(report(dense=None, **bare), [], [], tmp_path) == []
    path = tmp_path / "none.png"
    assert not draw_trade(report(metric=None), path)
    assert not draw_history([{"step": 1, "loss": 1.0}], path)
    assert not draw_layers({}, path)
    assert not draw_bits({"a": 4, "b": 4}, path)
    assert not draw_weights([], [torch.ones(2, 2)], path)
    assert not draw_weights([torch.zeros(2, 2)], [torch.zeros(2, 2)], path)
    assert not list(tmp_path.iterdir())


def test_a_training_without_pruning_shows_its_losses(tmp_path):
    rows = [{"step": step, "loss_task": 1.0, "loss_kd": 2.0} for step in (1, 2)]
    assert draw_history(rows, tmp_path / "losses.png")
