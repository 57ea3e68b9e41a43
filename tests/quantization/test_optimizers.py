"""Both callbacks under each optimizer of Trainer, the 8-bit and paged ones of bitsandbytes too."""

import pytest
import torch
from quantization.test_callback import on_grid, trainer
from tiny import tiny_bert

from hf_compress import PruningCallback, QuantizationCallback
from hf_compress.targets import find_targets


# The paged ones fall back to plain memory on a CPU, with a warning.
@pytest.mark.filterwarnings("ignore:Paged optimizers")
@pytest.mark.parametrize("sparsity", [None, 0.5])
@pytest.mark.parametrize(
    "optim", ["adamw_bnb_8bit", "paged_adamw_8bit", "adamw_torch_fused", "adafactor", "sgd"]
)
def test_trains_on_the_grid_and_resumes_bit_equal(tmp_path, optim, sparsity):
    def start():
        callbacks = [QuantizationCallback(4, grid="minmax", end=6)]
        callbacks += [] if sparsity is None else [PruningCallback(sparsity, interval=2, end=6)]
        # bitsandbytes keeps the state of smaller weights in 32 bit.
        model = tiny_bert(layers=1, hidden=64)
        settings = {"optim": optim, "max_steps": 8, "save_strategy": "steps", "save_steps": 4}
        return trainer(tmp_path, callbacks, model, **settings), callbacks[0]

    whole, callback = start()
    before = {name: value.clone() for name, value in whole.model.state_dict().items()}
    whole.train()
    parameters = find_targets(whole.model).parameters
    if "8bit" in optim:
        states = [whole.optimizer.state[p]["state1"] for p in parameters.values()]
        assert {state.dtype for state in states} == {torch.uint8}
    assert on_grid(whole.model, callback)
    assert not any(param.equal(before[name]) for name, param in parameters.items())
    zeros = sum(int((p == 0).sum()) for p in parameters.values())
    assert zeros >= round((sparsity or 0) * sum(p.numel() for p in parameters.values()))

    rest, its = start()
    rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    expected = whole.model.state_dict()
    assert all(value.equal(expected[name]) for name, value in rest.model.state_dict().items())
    assert all(grid.scale.equal(its.grids[name].scale) for name, grid in callback.grids.items())
