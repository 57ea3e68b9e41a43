import pytest
import torch
from tiny import tiny_llama
from torch import nn

from hf_compress.pruning.semi_structured import to_semi_structured_

NEEDS_GPU = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0),
    reason="torch has 2:4 kernels for compute capability 8.0 and higher",
)


def two_of_four(model):
    for module in model.modules():
        if type(module) is nn.Linear:
            groups = module.weight.data.view(-1, 4)
            groups.scatter_(1, groups.abs().topk(2, largest=False).indices, 0)
    return model


def test_it_is_refused_where_nothing_would_be_faster():
    model = two_of_four(tiny_llama())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"on cpu.*CUDA GPUs of compute capability 8\.0"):
        to_semi_structured_(model, {"input_ids": torch.arange(4)[None]})
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.gpu
@NEEDS_GPU
def test_only_faster_layers_change_and_outputs_stay():
    model = two_of_four(tiny_llama(hidden=1024, layers=1)).to("cuda", torch.bfloat16).eval()
    inputs = {"input_ids": torch.arange(64, device="cuda")[None].repeat(32, 1)}
    with torch.no_grad():
        expected = model(**inputs).logits
    seconds = to_semi_structured_(model, inputs)
    assert seconds
    for name, (dense, sparse) in seconds.items():
        changed = type(model.get_submodule(name).weight.data) is not torch.Tensor
        assert changed == (sparse < dense)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=0.05, atol=0.05)


@pytest.mark.gpu
@NEEDS_GPU
def test_dense_weights_are_refused():
    with pytest.raises(ValueError, match="no Linear"):
        to_semi_structured_(tiny_llama().to("cuda", torch.bfloat16), {})
