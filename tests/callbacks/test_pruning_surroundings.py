"""What surrounds pruning brings no zero back: optimizers, evaluations, casts, averages, compiling."""

import pytest
import torch
from short import arguments
from tiny import classification_rows, tiny_bert
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import Trainer, TrainerCallback

from hf_compress import PruningCallback
from hf_compress.callbacks.rigl import RigLCallback
from hf_compress.publishing.audit import audit
from hf_compress.targets import find_targets

END = 8


def zeros(model):
    return {name: param == 0 for name, param in find_targets(model).parameters.items()}


def count(model):
    return sum(int(zero.sum()) for zero in zeros(model).values())


class Watch(TrainerCallback):
    """Counts the zeros after each step and in each evaluation."""

    def __init__(self, pruning):
        self.pruning, self.steps, self.evaluations = pruning, [], []

    def look(self, model):
        size = sum(param.numel() for param in find_targets(model).parameters.values())
        return count(model), round(self.pruning.measurements()["sparsity"] * size)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.steps.append(self.look(model))

    def on_prediction_step(self, args, state, control, model=None, **kwargs):
        self.evaluations.append(self.look(model))


def train(folder, pruning=None, callbacks=(), model=None, **settings):
    pruning = pruning or PruningCallback(0.75, end=END, interval=2)
    watch = Watch(pruning)
    run = Trainer(
        model or tiny_bert(hidden=64),
        arguments(folder, max_steps=12, **settings),
        train_dataset=classification_rows(),
        eval_dataset=classification_rows(8),
        callbacks=[pruning, watch, *callbacks],
    )
    run.train()
    return run.model, watch


@pytest.mark.parametrize(
    "optimizer",
    [
        {"optim": "adamw_torch_fused"},
        {"optim": "adamw_bnb_8bit"},
        {"optim": "adafactor"},
        {"optim": "sgd", "optim_args": "momentum=0.9"},
    ],
    ids=lambda settings: settings["optim"],
)
@pytest.mark.parametrize("method", ["gradual", "rigl"])
def test_after_every_step_of_any_optimizer(tmp_path, optimizer, method):
    pruning = RigLCallback(0.75, interval=2, end=END) if method == "rigl" else None
    model, watch = train(tmp_path, pruning, weight_decay=0.1, learning_rate=1e-2, **optimizer)
    assert len(watch.steps) == 12
    for found, told in watch.steps:
        assert found == told
    assert found == round(0.75 * sum(p.numel() for p in find_targets(model).parameters.values()))


def test_in_evaluations(tmp_path):
    _, watch = train(tmp_path, eval_strategy="steps", eval_steps=3)
    assert len(watch.evaluations) >= 4
    assert all(found == told for found, told in watch.evaluations)
    assert watch.evaluations[0] < watch.evaluations[-1]


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated")
def test_under_compilation_and_checkpointed_activations(tmp_path):
    model = tiny_bert(hidden=64)
    places = {name: param.data_ptr() for name, param in model.named_parameters()}
    trained, watch = train(
        tmp_path,
        model=model,
        torch_compile=True,
        torch_compile_backend="eager",
        gradient_checkpointing=True,
    )
    plain, _ = train(tmp_path)
    assert all(found == told for found, told in watch.steps)
    assert {name: param.data_ptr() for name, param in trained.named_parameters()} == places
    # The same zeros as without either.
    same = zeros(plain)
    assert all(zero.equal(same[name]) for name, zero in zeros(trained).items())


def test_in_half_precision(tmp_path):
    model, _ = train(tmp_path / "training")
    dense_elsewhere = zeros(model)
    for dtype in (torch.bfloat16, torch.float16):
        model.to(dtype).save_pretrained(tmp_path / "cast")
        loaded = type(model).from_pretrained(tmp_path / "cast", dtype=dtype)
        assert all((dense_elsewhere[name] <= zero).all() for name, zero in zeros(loaded).items())


class Averaging(TrainerCallback):
    """A moving average of the weights, from a step on."""

    def __init__(self, first):
        self.first, self.average = first, None

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if self.average is None and state.global_step >= self.first:
            self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        if self.average is not None:
            self.average.update_parameters(model)


def test_an_average_is_as_sparse_once_the_zeros_stand_still(tmp_path):
    late, early = Averaging(first=END), Averaging(first=1)
    model, _ = train(tmp_path / "training", callbacks=[late, early])
    assert count(late.average.module) == count(model)
    # One that remembers denser steps is not, and its files say so.
    assert count(early.average.module) < count(model)
    early.average.module.save_pretrained(tmp_path / "average")
    names = list(find_targets(model).targets)
    with pytest.raises(ValueError, match="0.75"):
        audit(tmp_path / "average", targets=names).check(names, 0.75)


def test_the_order_of_parameter_groups_does_not_matter(tmp_path):
    found = []
    for turn in (1, -1):
        model = tiny_bert(hidden=64)
        matrices = [p for p in model.parameters() if p.dim() > 1]
        others = [p for p in model.parameters() if p.dim() == 1]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(
            [{**group, "params": group["params"][::turn]} for group in groups[::turn]], lr=1e-3
        )
        pruning = PruningCallback(0.75, end=END, interval=2)
        Trainer(
            model,
            arguments(tmp_path, max_steps=12),
            train_dataset=classification_rows(),
            callbacks=[pruning],
            optimizers=(optimizer, None),
        ).train()
        found.append(zeros(model))
    assert all(zero.equal(found[1][name]) for name, zero in found[0].items())
