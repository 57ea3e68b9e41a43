"""Inputs of layers as integers, while training and after it."""

import pytest
import torch
from short import arguments
from tiny import classification_rows, tiny_bert, tiny_gpt2
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, TrainerCallback

from hf_compress import QuantizationCallback
from hf_compress.quantization.activations import InputQuantizer
from hf_compress.quantization.calibrated import calibrated_grids
from hf_compress.targets import find_targets


def test_each_token_is_rounded_on_a_grid_of_its_own():
    net = nn.Sequential(nn.Linear(4, 1, bias=False))
    with torch.no_grad():
        net[0].weight.fill_(1.0)
    seen = []
    inputs = InputQuantizer(net, find_targets(net).targets, bits=8)
    net[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
    # 127.5 gives a scale of 1, and 0.1275 one of 0.001.
    tokens = torch.tensor([[[-127.5, 3.4, 0.2, 60.6], [0.1275, -0.0034, 0.0, 0.0606]]])
    tokens.requires_grad_()
    net(tokens).sum().backward()
    expected = torch.tensor([[[-128.0, 3.0, 0.0, 61.0], [0.127, -0.003, 0.0, 0.061]]])
    torch.testing.assert_close(seen[0], expected)
    assert tokens.grad.equal(torch.ones_like(tokens))
    inputs.enabled = False
    net(tokens)
    assert seen[1].equal(tokens)
    inputs.enabled = True
    inputs.remove()
    net(tokens)
    assert seen[2].equal(tokens)


def test_conv1d_has_its_inputs_last_too():
    model = tiny_gpt2()
    plain = model(torch.arange(8)[None]).logits
    inputs = InputQuantizer(model, find_targets(model).targets, bits=8)
    near = model(torch.arange(8)[None]).logits
    assert not near.equal(plain)
    torch.testing.assert_close(near, plain, atol=0.02, rtol=0)
    inputs.remove()
    assert model(torch.arange(8)[None]).logits.equal(plain)


def trainer(folder, callbacks, model=None, **settings):
    return Trainer(
        model or tiny_bert(),
        arguments(folder, max_steps=8, learning_rate=1e-2, **settings),
        train_dataset=classification_rows(),
        eval_dataset=classification_rows(seed=1),
        callbacks=callbacks,
    )


def test_evaluation_sees_integer_inputs_from_the_start_on_and_after_training(tmp_path):
    hooked = {}

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            outputs = []
            layer = model.bert.encoder.layer[0].attention.self.query
            handle = layer.register_forward_pre_hook(lambda module, args: outputs.append(args[0]))
            model(torch.arange(8)[None])
            handle.remove()
            hooked[state.global_step] = outputs[0][0, 0].unique().numel()

    callback = QuantizationCallback(8, activations=2, start=4, end=6)
    run = trainer(tmp_path, [callback, Look()], save_strategy="steps", save_steps=5)
    run.train()
    assert [hooked[step] <= 4 for step in range(1, 9)] == [False] * 3 + [True] * 5
    assert list(run.model.state_dict()) == list(tiny_bert().state_dict())
    after = run.evaluate()["eval_loss"]
    callback.remove_hooks()
    assert not any(module._forward_pre_hooks for module in run.model.modules())
    assert run.evaluate()["eval_loss"] != after
    assert callback.describe()["activations"] == 2

    rest = trainer(tmp_path, [QuantizationCallback(8, activations=2, start=4, end=6)])
    rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    expected = run.model.state_dict()
    assert all(value.equal(expected[name]) for name, value in rest.model.state_dict().items())


def test_checkpointed_activations_change_nothing():
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    InputQuantizer(net, find_targets(net).targets, bits=4)
    gradients = []
    for checkpointed in (False, True):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
        y = checkpoint(net, x, use_reentrant=False) if checkpointed else net(x)
        y.square().sum().backward()
        gradients.append([x.grad, net[0].weight.grad])
        net.zero_grad()
    assert all(one.equal(other) for one, other in zip(*gradients, strict=True))


NAME = "bert.encoder.layer.1.output.dense.weight"


def calibration():
    rows = classification_rows(rows=16, seed=7).with_format("torch")
    return [rows[:8], rows[8:]]


def layer_inputs(model, name, batches):
    """What the layer of the weight `name` is given."""
    seen = []
    layer = model.get_submodule(name.rpartition(".")[0])
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    training = model.training
    with torch.no_grad():
        for batch in batches:
            model.eval()(**batch)
    model.train(training)
    handle.remove()
    return torch.cat([inputs.flatten() for inputs in seen])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [8, 3])
def test_a_fixed_grid_equals_that_of_compressed_tensors_bit_for_bit(bits, dtype):
    package = pytest.importorskip("compressed_tensors.quantization")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(512, 1, bias=False)).to(dtype)
    targets = find_targets(net).targets
    calibration = [{"input": (3 * torch.rand(64, 512) - 1).to(dtype)}]
    grids = calibrated_grids(net, targets, calibration, bits=bits)
    grid = grids["0.weight"]
    InputQuantizer(net, targets, bits=bits, grids=grids)
    seen = []
    net[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    # Wider than the calibration, on both sides.
    inputs = 2 * torch.randn(500, 512, dtype=dtype)
    net(inputs)
    expected = package.fake_quantize(
        inputs,
        grid.scale.view(1),
        grid.zero_point.view(1).to(torch.int8),
        package.QuantizationArgs(num_bits=bits, symmetric=False, strategy="tensor"),
    )
    assert seen[0].equal(expected)
    assert len(seen[0].unique()) == 2**bits


@pytest.mark.parametrize("bits", [8, 3])
def test_a_fixed_grid_and_its_gradient_are_those_of_torch(bits):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 32, bias=False))
    targets = find_targets(net).targets
    grids = calibrated_grids(net, targets, [{"input": 3 * torch.rand(64, 32) - 1}], bits=bits)
    InputQuantizer(net, targets, bits=bits, grids=grids)
    grid = grids["0.weight"]
    ours, theirs = 2 * torch.randn(16, 32), torch.empty(16, 32)
    theirs.copy_(ours)
    seen = torch.fake_quantize_per_tensor_affine(
        theirs.requires_grad_(), grid.scale, grid.zero_point.int(), grid.lowest, grid.highest
    )
    # It rounds before it adds the zero point: the same, unless just between two codes.
    expected, found = seen @ net[0].weight.T, net(ours.requires_grad_())
    assert found.equal(expected)
    gradient = torch.randn(16, 32)
    expected.backward(gradient)
    found.backward(gradient)
    assert ours.grad.equal(theirs.grad)
    assert 0.1 < (ours.grad == 0).float().mean() < 0.9  # clipped


def test_a_fixed_grid_keeps_the_dtype_and_does_not_hide_nan():
    net = nn.Sequential(nn.Linear(2, 1))
    targets = find_targets(net).targets
    grids = calibrated_grids(net, targets, [{"input": torch.tensor([[-1.0, 1.0]])}])
    InputQuantizer(net, targets, grids=grids)
    assert net(torch.tensor([[0.5, torch.nan]])).isnan().all()
    with torch.autocast("cpu", torch.bfloat16):
        seen = []
        net[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        net(torch.ones(1, 2, dtype=torch.bfloat16))
    assert seen[0].dtype == torch.bfloat16


def test_the_grid_covers_what_the_batches_hold():
    net = nn.Sequential(nn.Linear(2, 1), nn.Dropout(0.5))
    net.train()
    batches = [{"input": torch.tensor([[-0.5, 0.25]])}, {"input": torch.tensor([[0.0, 2.05]])}]
    grid = calibrated_grids(net, find_targets(net).targets, batches)["0.weight"]
    # 255 steps from -0.5 to 2.05: the lowest code stands for -0.5, and zero lies on code -128 + 50.
    assert grid.scale.item() == pytest.approx(0.01)
    assert (grid.scale.dim(), grid.zero_point.item(), grid.bits) == (0, -78, 8)
    assert net[1].training
    assert not net[0]._forward_pre_hooks
    # Zero belongs to it where all inputs are positive.
    grid = calibrated_grids(net, find_targets(net).targets, [{"input": torch.tensor([[2.0, 5.1]])}])
    assert grid["0.weight"].scale.item() == pytest.approx(0.02)
    assert grid["0.weight"].zero_point.item() == -128


def test_fixed_grids_are_found_anew_until_the_end_and_kept_over_a_resume(tmp_path):
    found = {}

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            found[state.global_step] = callback.input_grids[NAME].scale

    def start():
        return QuantizationCallback(
            8, activations=8, calibration=calibration(), start=3, end=6, symmetric=False
        )

    callback = start()
    run = trainer(tmp_path, [callback, Look()], save_strategy="steps", save_steps=1)
    run.train()
    assert [step for step in range(2, 9) if not found[step].equal(found[step - 1])] == [3, 6]
    assert run.model.state_dict().keys() == tiny_bert().state_dict().keys()
    assert callback.describe()["calibration_batches"] == 2
    # Before the weights are on their grid, while it moves, and when it is fixed.
    for stop in (2, 5, 7):
        other = start()
        rest = trainer(tmp_path / "rest", [other])
        rest.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
        expected = run.model.state_dict()
        assert all(value.equal(expected[name]) for name, value in rest.model.state_dict().items())
        for name, grid in callback.input_grids.items():
            assert grid.scale.equal(other.input_grids[name].scale)
            assert grid.zero_point.equal(other.input_grids[name].zero_point)
        assert run.evaluate()["eval_loss"] == rest.evaluate()["eval_loss"]


def test_the_last_grids_cover_the_inputs_at_the_end(tmp_path):
    callback = QuantizationCallback(8, activations=8, calibration=calibration(), end=8)
    run = trainer(tmp_path, [callback])
    run.train()
    callback.remove_hooks()
    for name, grid in callback.input_grids.items():
        inputs = layer_inputs(run.model, name, calibration())
        low, high = (grid.scale * (code - grid.zero_point) for code in (grid.lowest, grid.highest))
        assert low - grid.scale <= inputs.min() <= low + grid.scale
        assert high - grid.scale <= inputs.max() <= high + grid.scale


def test_a_layer_that_the_batches_do_not_reach_is_refused():
    net = nn.ModuleDict({"used": nn.Linear(2, 2), "spare": nn.Linear(2, 2)})
    # Its forward skips the hooks, as a fused kernel would.
    net.forward = net["used"].forward
    with pytest.raises(ValueError, match=r"does not reach used.*`ignore`"):
        calibrated_grids(net, find_targets(net).targets, [{"input": torch.ones(1, 2)}])
    assert not any(module._forward_pre_hooks for module in net.modules())


def test_a_checkpoint_of_other_inputs_is_refused(tmp_path):
    trainer(
        tmp_path, [QuantizationCallback(8, activations=8)], save_strategy="steps", save_steps=5
    ).train()
    settings = {"activations": 8, "calibration": calibration()}
    with pytest.raises(ValueError, match="step 5 holds no grids for the inputs: resume with the"):
        trainer(tmp_path, [QuantizationCallback(8, **settings)]).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-5")
        )
    trainer(
        tmp_path, [QuantizationCallback(8, **settings)], save_strategy="steps", save_steps=5
    ).train()
    settings["activations"] = 6
    with pytest.raises(ValueError, match="holds grids of 8 bits.*`activations=8`"):
        trainer(tmp_path, [QuantizationCallback(8, **settings)]).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-5")
        )


@pytest.mark.parametrize("settings", [{"activations": 8}, {}], ids=["dynamic", "float"])
@pytest.mark.parametrize("stop", [2, 5, 7], ids=["before the grids", "moving", "fixed"])
def test_fixed_grids_are_not_lost_in_silence(fixed_run, tmp_path, stop, settings):
    run = trainer(tmp_path, [QuantizationCallback(8, start=3, end=6, **settings)])
    with pytest.raises(ValueError, match=r"a fixed grid of 8 bits for the inputs of .*`calibration`"):
        run.train(resume_from_checkpoint=str(fixed_run / f"checkpoint-{stop}"))
    assert not any(module._forward_pre_hooks for module in run.model.modules())


@pytest.fixture(scope="module")
def fixed_run(tmp_path_factory):
    """The folder of a training with fixed grids for the inputs."""
    folder = tmp_path_factory.mktemp("fixed")
    callback = QuantizationCallback(8, activations=8, calibration=calibration(), start=3, end=6)
    trainer(folder, [callback], save_strategy="steps", save_steps=1).train()
    return folder
