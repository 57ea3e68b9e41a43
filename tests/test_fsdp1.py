"""FSDP1 flattens the parameters, so that no constraint on a weight can be right: it is refused."""

import pytest
import torch
import torch.distributed as dist
from tiny import tiny_bert
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_compress import PruningCallback, constrain
from hf_compress.callbacks.structured import StructuredPruningCallback
from hf_compress.pruning.pruner import Pruner


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("use_orig_params", [False, True])
@pytest.mark.parametrize(
    "callback",
    [PruningCallback(0.5), StructuredPruningCallback(ffn=0.5)],
    ids=lambda c: type(c).__name__,
)
def test_the_callbacks_refuse_it(one_process, tmp_path, callback, use_orig_params):
    model = FullyShardedDataParallel(
        tiny_bert(), use_orig_params=use_orig_params, device_id=torch.device("cpu")
    )
    with pytest.raises(ValueError, match="use FSDP2"):
        callback.on_train_begin(
            TrainingArguments(str(tmp_path), use_cpu=True),
            TrainerState(max_steps=10),
            TrainerControl(),
            model=model,
            optimizer=torch.optim.AdamW(model.parameters()),
        )


def test_constrain_refuses_its_flat_parameters(one_process):
    model = FullyShardedDataParallel(tiny_bert(), device_id=torch.device("cpu"))
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match="flat parameter of FSDP1"):
        constrain(optimizer, dict(model.named_parameters()), Pruner(0.5))
