"""What pruning of neurons and heads refuses, and when."""

import copy
from functools import partial

import pytest
import torch
import torch.distributed as dist
from anatomies import ANATOMIES
from peft import LoraConfig, get_peft_model
from short import trainer
from tiny import (
    image_rows,
    language_rows,
    tiny_bert,
    tiny_llama,
    tiny_mixtral,
    tiny_vit,
)
from torch.distributed.fsdp import fully_shard
from transformers import DefaultFlowCallback

from hf_compress import PruningCallback, constrain
from hf_compress.callbacks.structured import StructuredPruningCallback
from hf_compress.pruning.structure.pruner import UnitPruner
from hf_compress.pruning.structure.units import find_units


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({}, "nothing to prune"),
        ({"ffn": 1.0}, r"`ffn` is 1.0"),
        ({"heads": -0.1}, r"`heads` is -0.1"),
        ({"ffn": 50}, "For half pass 0.5"),
        ({"ffn": True}, "`ffn` is True"),
        ({"ffn": 0.5, "end": 3.0}, "`end` is 3.0: a float is a fraction"),
        ({"ffn": 0.5, "start": -1}, "`start` is -1: steps count from 0"),
        ({"ffn": 0.5, "round_to": 0}, "`round_to` is 0: pass a number of neurons"),
        ({"ffn": 0.5, "round_to": 1.5}, "`round_to` is 1.5: pass a number of neurons"),
        ({"ffn": 0.5, "schedule": "quick"}, "`schedule` is 'quick'"),
        ({"ffn": 0.5, "start": 9, "end": 3}, "`start` .* is after `end`"),
    ],
)
def test_wrong_settings_are_refused_when_made(settings, error):
    with pytest.raises(ValueError, match=error):
        StructuredPruningCallback(**settings)


@pytest.mark.parametrize(
    ("callback", "error"),
    [
        (StructuredPruningCallback(heads=0.5), "heads cannot be removed from BertFor"),
        (StructuredPruningCallback(ffn=0.001), "leaves 64 of 64"),
        (StructuredPruningCallback(ffn=0.5, end=40), "the schedule ends at step 40"),
        (StructuredPruningCallback(ffn=0.5, round_to=100), "multiples of 100 leaves 0 of 64"),
    ],
)
def test_what_cannot_be_is_refused_before_the_first_step(tmp_path, callback, error):
    run = trainer(tmp_path, callback)
    before = copy.deepcopy(run.model.state_dict())
    with pytest.raises(ValueError, match=error):
        run.train()
    assert run.state.global_step == 0
    assert all(value.equal(before[name]) for name, value in run.model.state_dict().items())


def half_frozen():
    model = tiny_bert()
    model.bert.encoder.layer[0].requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("make", "fractions", "error"),
    [
        (half_frozen, {"ffn": 0.5}, r"layer\.0.* is frozen.*requires_grad_.*prune_structure"),
        (
            lambda: get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])),
            {"ffn": 0.5},
            "merge_and_unload",
        ),
        (tiny_llama, {"heads": 0.25}, "has 2 heads .*possible are 1/2"),
        (tiny_mixtral, {"ffn": 0.5}, "ffn cannot be removed.*What can be: heads, experts"),
    ],
)
def test_models_that_cannot_be_are_refused_before_the_first_step(tmp_path, make, fractions, error):
    run = trainer(tmp_path, StructuredPruningCallback(**fractions), make(), language_rows)
    with pytest.raises(ValueError, match=error):
        run.train()
    assert run.state.global_step == 0


def test_two_prunings_of_the_same_weights_are_refused(tmp_path):
    run = trainer(tmp_path, StructuredPruningCallback(ffn=0.5))
    run.add_callback(PruningCallback(0.5))
    with pytest.raises(ValueError, match="already has a UnitPruner.*give them other targets"):
        run.train()


def test_a_checkpoint_without_the_state_is_refused(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 10}
    trainer(tmp_path, DefaultFlowCallback(), **settings).train()
    with pytest.raises(ValueError, match="step 10 knows nothing of pruning ffn.*start=10"):
        trainer(tmp_path, StructuredPruningCallback(ffn=0.5)).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-10")
        )


@pytest.mark.parametrize("fractions", [{"ffn": 0.5}, {"heads": 0.5}])
def test_weights_that_were_not_loaded_are_told(tmp_path, fractions):
    """The tensors of a ViT have other names in files, and Trainer leaves them out with a warning."""
    settings = {"save_strategy": "steps", "save_steps": 10}

    def run(model):
        callback = StructuredPruningCallback(**fractions)
        return trainer(tmp_path, callback, model, partial(image_rows, 64), **settings)

    whole = run(tiny_vit())
    whole.train()
    checkpoint = str(tmp_path / "checkpoint-10")
    with pytest.raises(ValueError, match=r"were not loaded.*from_pretrained\(checkpoint\)"):
        run(tiny_vit()).train(resume_from_checkpoint=checkpoint)
    rest = run(type(whole.model).from_pretrained(checkpoint))
    rest.train(resume_from_checkpoint=checkpoint)
    assert all(v.equal(rest.model.state_dict()[k]) for k, v in whole.model.state_dict().items())


def test_layers_and_experts_are_for_before_the_training():
    with pytest.raises(
        ValueError, match="layers cannot be zeroed along a schedule, only ffn and heads"
    ):
        UnitPruner(find_units(tiny_bert(), ["layers"]), 0.5)


@pytest.mark.parametrize("decay", [1.0, -0.1, float("nan"), "0.9"])
def test_a_decay_that_is_none_is_refused(decay):
    with pytest.raises(ValueError, match="`decay` is .*such as 0.9"):
        UnitPruner(find_units(tiny_bert(), ["ffn"]), 0.5, decay=decay)


def test_gradients_that_are_not_finite_are_told(tmp_path):
    model = tiny_bert()
    pruner = UnitPruner(find_units(model, ["ffn"]), 0.5, start=0, end=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    constrain(optimizer, pruner.parameters, pruner)
    (model(**ANATOMIES["bert"].batch()).loss * torch.nan).backward()
    pruner.at(1, 2)
    with pytest.raises(ValueError, match="were not finite"):
        optimizer.step()


def test_sharded_parameters_are_refused():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = tiny_bert()
        fully_shard(model, mesh=dist.init_device_mesh("cpu", (1,)))
        pruner = UnitPruner(find_units(model, ["ffn"]), 0.5)
        with pytest.raises(ValueError, match="is sharded"):
            constrain(torch.optim.SGD(model.parameters(), lr=0.1), pruner.parameters, pruner)
    finally:
        dist.destroy_process_group()
