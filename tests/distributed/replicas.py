"""Run by two ranks: a Trainer with a callback that prunes or quantizes. Each rank checks its weights
and writes them to a file of its own; of "rows", every method in methods.py, they compare them."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))

import methods
from safetensors.torch import save_file
from test_methods import check_target
from tiny import classification_rows, tiny_bert
from transformers import Trainer, TrainingArguments

from hf_compress import PruningCallback, QuantizationCallback
from hf_compress.callbacks.structured import StructuredPruningCallback
from hf_compress.pruning.structure.removal import alive
from hf_compress.pruning.structure.units import find_units
from hf_compress.quantization.grids import fake_quantize, grouped
from hf_compress.targets import find_targets


def check_weights(model):
    parameters = find_targets(model).parameters.values()
    zeros = sum(int((p == 0).sum()) for p in parameters)
    assert zeros == round(0.7 * sum(p.numel() for p in parameters))


def check_units(model):
    assert [int(alive(u).sum()) for u in find_units(model, ["ffn"])] == [32, 32]


def check_grids(model):
    ranks = [None, None]
    scales = {name: grid.scale.tolist() for name, grid in quantization.grids.items()}
    dist.all_gather_object(ranks, scales)
    assert ranks[0] == ranks[1]
    parameters = find_targets(model).parameters
    assert scales.keys() == parameters.keys()
    for name, param in parameters.items():
        groups = grouped(param.detach(), input_dim=1, group_size=16)
        assert fake_quantize(groups, quantization.grids[name]).equal(groups)


quantization = QuantizationCallback(4, group_size=16, end=8, learn_scale=True)

METHODS = {
    "grids": (quantization, check_grids),
    "weights": (PruningCallback(0.7, interval=3), check_weights),
    "units": (StructuredPruningCallback(ffn=0.5), check_units),
}


def trained(folder, callback):
    trainer = Trainer(
        tiny_bert(),
        TrainingArguments(
            str(folder),
            max_steps=12,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            save_steps=12,
        ),
        train_dataset=classification_rows(),
        callbacks=[callback],
    )
    trainer.train()
    assert dist.get_world_size() == 2
    return trainer


def compare_rows(folder):
    for method in methods.METHODS:
        callback = method.make()
        trainer = trained(folder, callback)
        check_target(trainer.model, method, callback)
        for name, param in trainer.model.named_parameters():
            ranks = [torch.empty_like(param) for _ in range(2)]
            dist.all_gather(ranks, param.detach().contiguous())
            assert ranks[0].equal(ranks[1]), (method.name, name)
    # Once its group is destroyed, a reducer's end joins a thread that may wait for the interpreter: the
    # ranks leave together, with the group and the last trainer alive.
    dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    folder, method = Path(sys.argv[1]), sys.argv[2]
    if method == "rows":
        compare_rows(folder)
    callback, check = METHODS[method]
    trainer = trained(folder, callback)
    check(trainer.model)
    # `save_pretrained` writes on the first rank only.
    save_file(trainer.model.state_dict(), folder / f"{dist.get_rank()}.safetensors", {"format": "pt"})
    trainer.end()
