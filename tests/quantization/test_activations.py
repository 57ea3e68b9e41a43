"""Inputs of layers as integers, while training and after it."""

import pytest
import torch
from short import arguments
from tiny import classification_rows, tiny_bert, tiny_gpt2, tiny_mixtral
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, TrainerCallback

from hf_compress import QuantizationCallback
from hf_compress.quantization.activations import InputQuantizer
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


def test_refused(tmp_path):
    for bits in (1, 16, 8.0):
        with pytest.raises(ValueError, match="`activations` is .* from 2 to 8"):
            QuantizationCallback(4, activations=bits)
    model = tiny_mixtral()
    with pytest.raises(ValueError, match=r"stacked experts.*`ignore`"):
        trainer(tmp_path, [QuantizationCallback(4, activations=8)], model).train()
    assert not any(module._forward_pre_hooks for module in model.modules())
