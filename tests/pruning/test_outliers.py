import pytest
import torch
from accelerate import cpu_offload
from tiny import language_rows, tiny_gpt2, tiny_llama, tiny_mixtral

from hf_compress.pruning.allocate import owl
from hf_compress.pruning.outliers import outlier_ratio, outlier_ratios
from hf_compress.targets import find_targets


def batches(rows=8, size=4):
    data = language_rows(rows).with_format("torch")
    names = ("input_ids", "attention_mask")
    return [{name: data[name][i : i + size] for name in names} for i in range(0, rows, size)]


def test_by_hand():
    # Both together have a mean of 3, of which only 9 is twice and more.
    metrics = [torch.tensor([[1.0, 9.0], [5.0, 1.0]]), torch.tensor([[1.0, 1.0]])]
    assert outlier_ratio(metrics, 2.0) == 1 / 6
    assert outlier_ratio(metrics, 1.5) == 2 / 6
    # What equals the bound is none.
    assert outlier_ratio(metrics, 3.0) == 0.0


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_equal_to_the_norms_that_a_plain_forward_sees(make):
    model, squares = make().eval(), {}
    targets = find_targets(model).targets
    hooks = []
    for name in targets:
        owner = model.get_submodule(name.removesuffix(".weight"))

        def see(module, args, name=name):
            real = args[0][mask]  # (positions, in)
            squares[name] = squares.get(name, 0) + real.square().sum(0)

        hooks.append(owner.register_forward_pre_hook(see))
    for batch in batches():
        mask = batch["attention_mask"].bool()
        with torch.no_grad():
            model(**batch)
    for hook in hooks:
        hook.remove()
    found = outlier_ratios(model, batches(), threshold=2.0)
    assert list(found) == list(targets)
    for layer in ("0", "1"):
        names = [name for name in targets if f".{layer}." in name]
        metrics = []
        for name in names:
            weight = targets[name].param.detach().abs()
            weight = weight.t() if targets[name].input_dim == 0 else weight
            metrics.append((weight * squares[name].sqrt()).flatten())
        metrics = torch.cat(metrics)
        ratio = (metrics > 2 * metrics.mean()).float().mean().item()
        assert {name: found[name] for name in names} == dict.fromkeys(names, pytest.approx(ratio))
        assert 0 < ratio < 1


@pytest.mark.parametrize("positions", [16, 1])  # one position leaves experts without any
def test_experts_count_what_is_routed_to_them(positions):
    model = tiny_mixtral(layers=1, experts=4).eval()
    experts, ids = model.model.layers[0].mlp.experts, torch.arange(5, 5 + positions)[None]
    metrics = []

    def see(module, args):
        inputs, chosen, _ = args  # (positions, in), (positions, top k)
        for expert in range(4):
            rows = inputs[(chosen == expert).any(1)]
            gate, up = (rows @ experts.gate_up_proj[expert].T).chunk(2, dim=1)
            norms = rows.norm(dim=0), (torch.nn.functional.silu(gate) * up).norm(dim=0)
            weights = experts.gate_up_proj[expert], experts.down_proj[expert]
            metrics.extend((w.abs() * n).flatten() for w, n in zip(weights, norms, strict=True))

    hook = experts.register_forward_pre_hook(see)
    with torch.no_grad():
        model(input_ids=ids)
    hook.remove()
    metric = torch.cat(metrics)
    expected = (metric > 2 * metric.mean()).float().mean().item()
    found = outlier_ratios(model, [{"input_ids": ids}], threshold=2.0, targets="experts")
    names = ("gate_up_proj", "down_proj")
    prefix = "model.layers.0.mlp.experts."
    assert found == {prefix + name: pytest.approx(expected, abs=1e-4) for name in names}
    assert 0 < expected < 1
    unreached = sum(not part.any() for part in metrics)
    assert unreached == (4 if positions == 1 else 0)


@pytest.mark.parametrize("make", [tiny_llama, tiny_mixtral])
def test_offloaded_weights_give_the_same(make):
    ids = torch.arange(5, 37).view(2, 16)
    expected = outlier_ratios(make(), [{"input_ids": ids}])
    model = cpu_offload(make(), torch.device("cpu"))
    assert outlier_ratios(model, [{"input_ids": ids}]) == expected
    assert all(weight.is_meta for weight in find_targets(model).parameters.values())


def test_a_block_with_outliers_stays_denser():
    model = tiny_llama(layers=3)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[:3] *= 20
    ratios = outlier_ratios(model, batches(), threshold=10)
    fractions = owl(find_targets(model).parameters, 0.7, ratios)
    sparsity = [
        [value for name, value in fractions.items() if f".{layer}." in name] for layer in range(3)
    ]
    assert max(sparsity[1]) < min(sparsity[0] + sparsity[2])
    assert max(sparsity[0] + sparsity[2]) - min(sparsity[1]) == pytest.approx(0.16, abs=1e-2)


def test_nothing_is_changed():
    model = tiny_llama().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    outlier_ratios(model, batches())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"threshold": 0.5}, ValueError, "`threshold` is 0.5"),
        ({"threshold": float("nan")}, ValueError, "`threshold` is nan"),
        ({"threshold": "5"}, ValueError, "`threshold` is '5'.*such as 5"),
        ({"calibration": batches()[0]}, TypeError, "`calibration` is a dict: pass several batches"),
        ({"calibration": []}, ValueError, "`calibration` is empty"),
        ({"calibration": ["text"]}, TypeError, "no mapping of tensors"),
        ({"targets": "nothing"}, ValueError, "matches no weight"),
        ({"targets": "model.embed_tokens"}, ValueError, "belongs to a Embedding.*Leave it out"),
        ({"model": tiny_mixtral()}, ValueError, "padding.*experts.gate_up_proj.*give full rows"),
    ],
)
def test_wrong_arguments_are_refused(arguments, error, message):
    arguments = {"model": tiny_llama(), "calibration": batches()} | arguments
    with pytest.raises(error, match=message):
        outlier_ratios(**arguments)


def test_activations_that_overflow_are_told():
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1e30)
    with pytest.raises(ValueError, match="NaN or infinite.*bfloat16 or float32"):
        outlier_ratios(model, batches())


def test_targets_that_are_not_reached_are_told():
    model = tiny_llama()
    skipped, *_ = model.model.layers
    skipped.forward = lambda hidden_states, **kwargs: hidden_states
    with pytest.raises(ValueError, match=r"does not call `model\.layers\.0\..*`ignore="):
        outlier_ratios(model, batches())
