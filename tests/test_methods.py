"""What must hold for every method, on every architecture.

Of the cross product each method meets one or two architectures in a quick run, so that all are met;
`make slow` runs the rest.
"""

import json

import pytest
import torch
from datasets import Dataset
from methods import METHODS, SPARSITY, pruning
from short import arguments
from tiny import (
    VOCABULARY,
    classification_rows,
    image_rows,
    language_rows,
    random_sound,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_mixtral,
    tiny_t5,
    tiny_vit,
    tiny_whisper,
)
from transformers import Trainer

from hf_compress.quantization.grids import fake_quantize, grouped
from hf_compress.targets import find_targets

STEPS = 12


def sound_rows():
    sound = random_sound(16)
    labels = torch.randint(5, VOCABULARY, (16, 8), generator=torch.Generator().manual_seed(0))
    return Dataset.from_dict({"input_features": sound.tolist(), "labels": labels.tolist()})


MODELS = {
    "BERT": (tiny_bert, classification_rows),
    "GPT-2": (tiny_gpt2, language_rows),
    "Llama": (tiny_llama, language_rows),
    "T5": (tiny_t5, language_rows),
    "ViT": (tiny_vit, image_rows),
    "Whisper": (tiny_whisper, sound_rows),
    "Mixtral": (tiny_mixtral, language_rows),
}


RENAMED = ("ViT", "Mixtral")  # in the files: Trainer does not load such weights when it resumes


def trainer(folder, method, model_name, model=None, **settings):
    make_model, make_rows = MODELS[model_name]
    defaults = {"max_steps": STEPS, "learning_rate": 5e-3}
    return Trainer(
        model or make_model(),
        arguments(folder, **(defaults | settings)),
        train_dataset=make_rows(),
        callbacks=[method.make()],
    )


def pairs(each):
    """Each method with every architecture: all but `each` of them slow."""
    names, chosen = list(MODELS), []
    for i, method in enumerate(METHODS):
        fitting = [n for n in names if method.experts or n != "Mixtral"]
        quick = {fitting[(i * each + j) % len(fitting)] for j in range(each)}
        chosen += [
            pytest.param(
                method,
                name,
                id=f"{method.name}-{name}",
                marks=() if name in quick else pytest.mark.slow,
            )
            for name in fitting
        ]
    return chosen


def check_target(model, method, callback):
    """What was asked for is true of the weights."""
    if method.bits is None:
        check_zeros(model, method)
    else:
        check_grid(model, method.bits, callback)


def check_grid(model, bits, callback):
    """No group has more values than its bits can tell, and they are those of its grid."""
    for name, target in find_targets(model).targets.items():
        weight = target.param.detach()
        groups = grouped(weight, input_dim=target.input_dim, group_size=callback.group_size)
        assert all(len(group.unique()) <= 2**bits for group in groups.flatten(0, -2))
        assert fake_quantize(groups, callback.grids[name]).equal(groups)


def check_zeros(model, method):
    """Exactly as many zeros as asked, where they were asked."""
    targets = find_targets(model).targets.values()
    zeros = {target.name: target.param == 0 for target in targets}
    if method.by == "model" and method.pattern != "row":
        pruned, size = sum(int(z.sum()) for z in zeros.values()), sum(z.numel() for z in zeros.values())
        assert pruned == round(SPARSITY * size)
    for target in targets:
        zero = zeros[target.name].movedim(target.input_dim, -1)
        if method.by == "weight":
            assert int(zero.sum()) == round(SPARSITY * zero.numel())
        elif method.by == "row":
            assert (zero.sum(-1) == zero.shape[-1] / 2).all()
        elif method.by == "4":
            assert (zero.reshape(-1, 4).sum(-1) == 2).all()
        if "x" in method.pattern:
            rows, columns = map(int, method.pattern.split("x"))
            out, width = zero.shape[-2:]
            blocks = zero.reshape(-1, out // rows, rows, width // columns, columns)
            assert (blocks.all(4).all(2) == blocks.any(4).any(2)).all()
        elif method.pattern == "row":
            assert (zero.all(-1) == zero.any(-1)).all()
    if method.pattern == "row":
        by_width = {}
        for target in targets:
            zero = zeros[target.name].movedim(target.input_dim, -1)
            by_width.setdefault(zero.shape[-1], []).append(zero.all(-1).flatten())
        for whole_rows in by_width.values():
            whole = torch.cat(whole_rows)
            assert int(whole.sum()) == round(SPARSITY * len(whole))


@pytest.mark.parametrize(("method", "name"), pairs(2))
def test_trains_hits_its_target_and_reloads_plain(tmp_path, method, name):
    run = trainer(tmp_path, method, name)
    dense = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    run.train()
    callback = run.callback_handler.callbacks[-2]
    assert all(not torch.isnan(p).any() for p in run.model.parameters())
    check_target(run.model, method, callback)
    selection = find_targets(run.model)
    for n, param in run.model.named_parameters():
        if n not in selection.targets and dense[n].any():
            assert param.any(), n  # what is not targeted is not pruned
    assert not any(m._forward_pre_hooks for m in run.model.modules())
    run.save_model(str(tmp_path / "model"))
    plain = type(run.model).from_pretrained(tmp_path / "model").eval()
    check_target(plain, method, callback)
    batch = next(iter(run.get_train_dataloader()))
    with torch.no_grad():
        assert plain(**batch).logits.equal(run.model.eval()(**batch).logits)


@pytest.mark.parametrize(("method", "name"), pairs(1))
def test_resume_is_bit_equal(tmp_path, method, name):
    settings = {"save_strategy": "steps", "save_steps": 5}
    whole = trainer(tmp_path, method, name, **settings)
    whole.train()
    model, checkpoint = None, str(tmp_path / "checkpoint-5")
    if name in RENAMED:
        model = type(whole.model).from_pretrained(checkpoint)
    rest = trainer(tmp_path, method, name, model, **settings)
    rest.train(resume_from_checkpoint=checkpoint)
    for param, other in zip(whole.model.parameters(), rest.model.parameters(), strict=True):
        assert param.equal(other)


@pytest.mark.parametrize("name", RENAMED)
def test_weights_that_were_not_loaded_are_told(tmp_path, name):
    method = METHODS[0]
    trainer(tmp_path, method, name, save_strategy="steps", save_steps=5).train()
    with pytest.raises(ValueError, match=r"were not loaded.*from_pretrained\(checkpoint\)"):
        trainer(tmp_path, method, name).train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))


@pytest.mark.parametrize("name", RENAMED)
def test_weights_that_were_not_loaded_are_told_before_any_is_pruned(tmp_path, name):
    method, settings = pruning("late", start=6), {"save_strategy": "steps", "save_steps": 2}
    whole = trainer(tmp_path, method, name, **settings)
    whole.train()
    checkpoint = str(tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match=r"were not loaded.*from_pretrained\(checkpoint\)"):
        trainer(tmp_path, method, name).train(resume_from_checkpoint=checkpoint)
    rest = trainer(tmp_path, method, name, type(whole.model).from_pretrained(checkpoint))
    rest.train(resume_from_checkpoint=checkpoint)
    for param, other in zip(whole.model.parameters(), rest.model.parameters(), strict=True):
        assert param.equal(other)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_the_cut_of_the_batch_does_not_change_the_zeros(tmp_path, method):
    masks = []
    for batch, accumulation in ((8, 1), (2, 4)):
        run = trainer(
            tmp_path,
            method,
            "ViT",
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            optim="sgd",
            learning_rate=1e-4,
        )
        run.train()
        parameters = find_targets(run.model).parameters
        masks.append(torch.cat([(p == 0).flatten() for p in parameters.values()]))
    # Gradients summed in another order differ in the last bits, and nearly equal scores may swap.
    assert (masks[0] != masks[1]).float().mean() < 0.01


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_nonsense_is_refused_before_the_first_step(tmp_path, method):
    run = trainer(tmp_path, method, "BERT")
    callback = run.callback_handler.callbacks[-2]
    callback.targets = "atention"
    before = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    with pytest.raises(ValueError, match="near names: attention"):
        run.train()
    assert all(p.equal(before[n]) for n, p in run.model.named_parameters())
    assert not any(m._forward_pre_hooks for m in run.model.modules())


@pytest.mark.parametrize("method", [m for m in METHODS if not m.experts], ids=lambda m: m.name)
def test_experts_are_refused_where_their_inputs_are_needed(tmp_path, method):
    with pytest.raises(ValueError, match=r"experts.*leave it out by `ignore`"):
        trainer(tmp_path, method, "Mixtral").train()


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_describes_itself(method):
    described = json.loads(json.dumps(method.make().describe()))
    if method.bits is None:
        assert described["sparsity"] == SPARSITY
    else:
        assert described["bits"] in (method.bits, [8, 6, method.bits])
    assert described["method"]
    assert described["paper"].startswith("arXiv:")
