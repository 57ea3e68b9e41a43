"""Run by two ranks: DistillationTrainer under FSDP2, against the same under DDP. Exits 0 when losses
and norms of gradients are equal, and student and teachers are cut into shards.

Accelerate shards on accelerators only: it is told that these CPUs are some.
"""

import os
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

os.environ.update(
    FSDP_VERSION="2",
    FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP",
    FSDP_STATE_DICT_TYPE="FULL_STATE_DICT",
)
sys.path.insert(0, str(Path(__file__).parents[1]))

from accelerate import PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType
from peft import LoraConfig, get_peft_model
from tiny import language_rows, tiny_bert, tiny_llama
from torch.distributed.tensor import DTensor

from hf_compress import DistillationArguments, DistillationTrainer, Match

SPREAD = {"initializer_range": 0.3}


def llama(seed=0, **settings):
    return tiny_llama(seed=seed, **SPREAD, **settings)


def adapted():
    return get_peft_model(llama(), LoraConfig(r=2, init_lora_weights=False, task_type="CAUSAL_LM"))


def saved(folder):
    """The first process writes it."""
    if dist.get_rank() == 0:
        llama(1, layers=3).save_pretrained(folder)
    dist.barrier()
    return folder


def prompted():
    """Rows of which the second half is to be written, and two of rank 1 that have nothing to write."""
    rows = language_rows(rows=8).to_list()
    for number, row in enumerate(rows):
        half = len(row["labels"]) if number in (2, 3) else len(row["labels"]) // 2
        row["labels"] = [-100] * half + row["labels"][half:]
    return type(language_rows()).from_list(rows)


CASES = {
    "a module": lambda folder: (llama(), llama(1, layers=3), language_rows(), {}, {}),
    "a path": lambda folder: (llama(), saved(folder), language_rows(), {}, {}),
    "in chunks": lambda folder: (llama(), llama(1), language_rows(), {"chunk_size": 5}, {}),
    "itself": lambda folder: (llama(), "self", language_rows(), {}, {}),
    "several": lambda folder: (llama(), [llama(1), "self"], language_rows(), {}, {}),
    "its base": lambda folder: (adapted(), "base", language_rows(), {}, {}),
    "tied": lambda folder: (
        llama(tie_word_embeddings=True),
        llama(1, tie_word_embeddings=True),
        language_rows(),
        {"chunk_size": 5},
        {},
    ),
    "inside": lambda folder: (
        llama(),
        llama(1, layers=4),
        language_rows(),
        {},
        {"matches": [Match("hidden"), Match("attention")]},
    ),
    "written": lambda folder: (
        llama(),
        llama(1),
        prompted(),
        {"on_policy": 1.0, "on_policy_temperature": 0.0},
        {},
    ),
}


def arguments(folder, *, shard, **settings):
    for state in (AcceleratorState, GradientState):
        state._reset_state()
    os.environ["ACCELERATE_USE_FSDP"] = str(shard).lower()
    args = DistillationArguments(
        folder,
        per_device_train_batch_size=2,
        max_steps=2,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        train_sampling_strategy="sequential",
        **settings,
    )
    assert args.device.type == "cpu"
    if shard:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return args


def sharded_parts(model):
    return [isinstance(each, DTensor) for each in model.parameters()]


def trained(case, *, shard):
    folder = sys.argv[1]
    student, teacher, rows, settings, others = CASES[case](f"{folder}/teacher")
    trainer = DistillationTrainer(
        student,
        arguments(folder, shard=shard, **settings),
        train_dataset=rows,
        eval_dataset=rows.select(range(5)),
        teacher=teacher,
        **others,
    )
    trainer.train()
    evaluated = trainer.evaluate()
    # What a student's forward gathers last stays whole for the backward pass, also after an evaluation.
    assert any(sharded_parts(trainer.model)) == shard
    assert all(all(sharded_parts(each)) for each in trainer.teachers) or not shard or "base" in case
    steps = [log for log in trainer.state.log_history if "loss" in log]
    losses = [value for log in steps for name, value in log.items() if "loss" in name]
    return [*losses, *(log["grad_norm"] for log in steps), evaluated["eval_loss"]]


def refuse(message, folder, *, version="2", **settings):
    os.environ["FSDP_VERSION"] = version
    with pytest.raises(NotImplementedError, match=message):
        DistillationTrainer(tiny_bert(), arguments(folder, shard=True), **settings)
    os.environ["FSDP_VERSION"] = "2"


if __name__ == "__main__":
    dist.init_process_group("gloo")
    for name in CASES:
        sharded, replicated = (trained(name, shard=shard) for shard in (True, False))
        assert sharded == pytest.approx(replicated, rel=1e-4), (name, sharded, replicated)
    teachers = [tiny_bert(), tiny_bert()]
    refuse("cut into shards", sys.argv[1], teacher=teachers, teacher_column="source")
    refuse("FSDP1 is not supported", sys.argv[1], version="1", teacher=tiny_bert())
    dist.destroy_process_group()
