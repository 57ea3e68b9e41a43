import json

import pytest
import torch
from tiny import classification_rows, tiny_bert

from hf_compress.pruning.sensitivity import Sensitivity, scan_sensitivity
from hf_compress.targets import find_targets

TARGETS = ["query", "re:layer.1.output.dense"]


def names(model):
    return list(find_targets(model, TARGETS).targets)


def loss_of(model):
    rows = classification_rows(16).with_format("torch")
    batch = {name: rows[name][:] for name in ("input_ids", "attention_mask", "labels")}
    with torch.no_grad():
        return model.eval()(**batch).loss.item()


@pytest.fixture(scope="module")
def model():
    return tiny_bert()


@pytest.fixture(scope="module")
def scan(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    scan = scan_sensitivity(
        model, loss_of, greater_is_better=False, sparsities=(0.3, 0.9), targets=TARGETS
    )
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    return scan


def test_each_entry_is_the_metric_of_the_model_pruned_there_alone(model, scan):
    assert scan.dense == loss_of(model)
    assert list(scan.metrics) == names(model)
    for name, curve in scan.metrics.items():
        for sparsity, metric in curve.items():
            pruned = tiny_bert()
            weight = pruned.get_parameter(name)
            lowest = weight.abs().flatten().argsort()[: round(sparsity * weight.numel())]
            with torch.no_grad():
                weight.view(-1)[lowest] = 0
            assert metric == loss_of(pruned)


def test_given_scores_rank_instead_of_the_magnitude():
    model, seen = tiny_bert(), []
    (name,) = find_targets(model, "re:layer.0.*query.weight").targets
    weight = model.get_parameter(name)
    score = torch.arange(weight.numel()).float().view_as(weight)

    def evaluate(model):
        seen.append(weight.detach().clone())
        return 0.0

    scan_sensitivity(
        model,
        evaluate,
        greater_is_better=False,
        sparsities=[0.25],
        scores={name: score},
        targets=name,
    )
    dense, pruned = seen
    assert pruned.view(-1)[: weight.numel() // 4].eq(0).all()
    assert pruned.view(-1)[weight.numel() // 4 :].equal(dense.view(-1)[weight.numel() // 4 :])


def test_an_evaluation_that_fails_leaves_the_model_as_it_was():
    model, calls = tiny_bert(), []
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def evaluate(model):
        calls.append(model)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return 1.0

    with pytest.raises(KeyboardInterrupt):
        scan_sensitivity(model, evaluate, greater_is_better=True)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


def test_harm_is_positive_where_the_model_gets_worse():
    metrics = {"a": {0.5: 0.9, 0.8: 0.7}}
    accuracy = Sensitivity(metrics=metrics, dense=0.8, greater_is_better=True)
    assert accuracy.harm() == {"a": pytest.approx({0.5: -0.1, 0.8: 0.1})}
    loss = Sensitivity(metrics=metrics, dense=0.8, greater_is_better=False)
    assert loss.harm() == {"a": pytest.approx({0.5: 0.1, 0.8: -0.1})}


def test_what_hurts_more_is_pruned_less(model):
    hurt, *others = names(model)
    metrics = {name: {0.95: 1.0 + (3.0 if name == hurt else 1.0)} for name in names(model)}
    scan = Sensitivity(metrics=metrics, dense=1.0, greater_is_better=False)
    fractions = scan.allocate(model, 0.6)
    sizes = {name: model.get_parameter(name).numel() for name in fractions}
    assert sum(round(fractions[n] * sizes[n]) for n in sizes) == round(0.6 * sum(sizes.values()))
    for name in others:
        assert fractions[name] == pytest.approx(3 * fractions[hurt], abs=0.01)


def test_it_can_be_read_and_seen(scan, tmp_path):
    table = str(scan).splitlines()
    assert table[0] == f"metric of the dense model: {scan.dense:.4g}"
    assert table[1].split()[-2:] == ["0.3", "0.9"]
    for row, (name, curve) in zip(table[2:], scan.metrics.items(), strict=True):
        assert row.split() == [name, *(f"{metric:.4g}" for metric in curve.values())]
    scan.draw(tmp_path / "scan.png")
    assert (tmp_path / "scan.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads(json.dumps(scan.to_dict()))["dense"] == scan.dense


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsities": (0.5, 80)}, "`sparsity` is 80"),
        ({"sparsities": ()}, "`sparsities` is"),
        ({"sparsities": (0.9, 0.5)}, "`sparsities` is"),
        ({"sparsities": (0.0, 0.5)}, "`sparsities` is"),
        ({"sparsities": 0.5}, r"`sparsities` is 0.5: give fractions in \(0, 1\)"),
        ({"targets": "nothing"}, "matches no weight"),
        ({"scores": {}}, "`scores` has nothing for"),
        ({"scores": {names(tiny_bert())[0]: torch.ones(3)}, "targets": "query"}, r"has shape \(3,\)"),
        ({"evaluate": lambda model: float("nan")}, "`evaluate` gave nan"),
        ({"evaluate": lambda model: {"eval_loss": 1.0}}, "`evaluate` gave a dict: return one number"),
        ({"evaluate": lambda model: None}, "`evaluate` gave a NoneType: return one number"),
        ({"evaluate": 0.5}, "`evaluate` is a float: pass a function of the model"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_pruned(arguments, message):
    model = tiny_bert()
    dense = model.state_dict()[names(model)[0]].clone()

    def evaluate(model):
        assert model.state_dict()[names(model)[0]].equal(dense)
        raise AssertionError("work began before the refusal")

    arguments = {"evaluate": evaluate, "greater_is_better": False} | arguments
    with pytest.raises((ValueError, TypeError), match=message):
        scan_sensitivity(model, arguments.pop("evaluate"), **arguments)
