"""Matches inside a whole training: what they leave, resume, stand beside, and really teach."""

import copy
from pathlib import Path

import pytest
import torch
from comparing import assert_equal, weights
from tiny import classification_rows, language_rows, tiny_bert, tiny_llama
from transformers import AutoModelForSequenceClassification

from hf_compress import DistillationArguments, DistillationTrainer, PruningCallback
from hf_compress.distillation.features.match import Match
from hf_compress.distillation.features.matching import FILE

SPREAD = {"initializer_range": 0.3}
PROJECTED = (
    Match("hidden", projection=True, learning_rate=0.05),
    Match("embeddings", projection=True),
)


def trainer_of(
    folder, student, teacher, matches, rows=None, *, callbacks=(), eval_dataset=None, **changes
):
    settings = {
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return DistillationTrainer(
        student,
        DistillationArguments(str(folder), **{**settings, **changes}),
        train_dataset=classification_rows() if rows is None else rows,
        eval_dataset=eval_dataset,
        teacher=teacher,
        matches=matches,
        callbacks=list(callbacks),
    )


def trained(*given, **changes):
    trainer = trainer_of(*given, **changes)
    trainer.train()
    return trainer


def logged(trainer, name):
    return [log[name] for log in trainer.state.log_history if name in log]


# What is logged, and what it adds up to


def test_the_loss_is_the_weighted_sum_of_its_logged_parts(tmp_path):
    matches = [Match("hidden", weight=2.0), Match("values", layers="final", weight=0.5)]
    trainer = trained(tmp_path, tiny_bert(**SPREAD), tiny_bert(layers=4, seed=1, **SPREAD), matches)
    for log in (log for log in trainer.state.log_history if "loss" in log):
        outputs = 0.5 * log["loss_task"] + 0.5 * log["loss_kd"]
        expected = outputs + 2 * log["loss_hidden"] + 0.5 * log["loss_values"]
        assert log["loss"] == pytest.approx(expected, rel=1e-5)


def test_evaluation_compares_the_outputs_only(tmp_path):
    rows = classification_rows(rows=8)
    trainer = trained(
        tmp_path,
        tiny_bert(),
        tiny_bert(seed=1),
        "tinybert",
        eval_dataset=rows,
        eval_strategy="steps",
        eval_steps=2,
    )
    inside = logged(trainer, "eval_loss")[-1]
    after = trainer.evaluate()
    assert after["eval_loss"] == pytest.approx(inside)
    assert after["eval_loss"] == pytest.approx((after["eval_loss_task"] + after["eval_loss_kd"]) / 2)
    assert "eval_loss_hidden" not in after


def test_a_weight_may_change_between_steps_and_0_leaves_the_match_out(tmp_path):
    trainer = trainer_of(
        tmp_path, tiny_bert(), tiny_bert(seed=1), [Match("hidden"), Match("attention")]
    )
    trainer.matching.weights["attention"] = 0.0
    trainer.train()
    assert len(logged(trainer, "loss_hidden")) == 4
    assert not logged(trainer, "loss_attention")


def test_the_inside_is_learned(tmp_path):
    """With hardly any weight on the outputs, the student comes to have the teacher's hidden states."""
    trainer = trained(
        tmp_path,
        tiny_bert(**SPREAD),
        tiny_bert(layers=4, seed=1, **SPREAD),
        [Match("hidden", weight=10.0), Match("attention", weight=10.0)],
        max_steps=60,
        per_device_train_batch_size=16,
        learning_rate=3e-3,
    )
    for name in ("loss_hidden", "loss_attention"):
        losses = logged(trainer, name)
        assert losses[-1] < 0.8 * losses[0], name


@pytest.mark.parametrize("padding", ["right", "left"])
def test_padding_counts_nowhere(tmp_path, padding):
    """More of it, whatever it holds, changes neither the loss nor the step that is taken."""
    matches = [
        Match("hidden"),
        Match("hidden", tokens="last", layers="final", name="last"),
        Match("attention"),
        Match("attention", distance="mse", name="scores"),
        Match("values"),
    ]
    rows = language_rows(rows=16)
    wider = rows.map(lambda row: padded(row, padding))
    runs = [
        trained(
            tmp_path,
            tiny_llama(**SPREAD),
            tiny_llama(layers=3, seed=1, **SPREAD),
            matches,
            data,
            per_device_train_batch_size=16,
            max_steps=2,
        )
        for data in (rows, wider)
    ]
    for name in ("loss", "grad_norm", *(f"loss_{name}" for name in runs[0].matching.weights)):
        assert logged(runs[1], name) == pytest.approx(logged(runs[0], name), rel=1e-4), name


def padded(row, side):
    added = {"input_ids": [7] * 5, "attention_mask": [0] * 5, "labels": [-100] * 5}
    if side == "right":
        return {name: row[name] + filling for name, filling in added.items()}
    real = sum(row["attention_mask"])
    moved = {
        name: filling + [0 if name != "labels" else -100] * (16 - real) + row[name][:real]
        for name, filling in added.items()
    }
    moved["labels"][-real] = -100  # it would be predicted by padding
    return moved


# What is left behind


def test_the_student_is_as_if_trained_without_matches_but_for_its_weights(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2}
    plain = trained(tmp_path / "plain", tiny_bert(hidden=16), tiny_bert(seed=1), (), **saving)
    ours = trained(tmp_path / "ours", tiny_bert(hidden=16), tiny_bert(seed=1), PROJECTED, **saving)
    assert files(tmp_path / "ours") == files(tmp_path / "plain") | {
        f"checkpoint-{step}/{FILE}" for step in (2, 4)
    }
    for name in ("model.safetensors", "config.json"):
        sizes = {(tmp_path / run / "checkpoint-4" / name).stat().st_size for run in ("ours", "plain")}
        assert len(sizes) == 1, name
    for model in (ours.model, ours.teacher):
        for module in model.modules():
            assert not module._forward_hooks
            assert not module._forward_pre_hooks
    assert ours.model.config._attn_implementation == plain.model.config._attn_implementation
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours" / "checkpoint-4")
    assert_equal(weights(loaded), weights(ours.model))


def files(folder):
    return {str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file()}


def test_a_training_that_fails_leaves_nothing_on_the_models_either(tmp_path):
    student, teacher = tiny_bert(), tiny_bert(seed=1)
    trainer = trainer_of(tmp_path, student, teacher, "minilm")
    teacher.classifier.forward = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    for model in (student, teacher):
        assert model.config._attn_implementation == "sdpa"
        assert all("_hf_compress_watcher" not in vars(module) for module in model.modules())


def test_the_randomness_of_the_training_is_untouched(tmp_path):
    """A match without weight, its projection drawn: dropout and shuffling are those without it."""
    dropout = {"classifier_dropout": 0.5}
    runs = [
        trained(tmp_path, tiny_bert(**dropout), tiny_bert(seed=1, hidden=48), matches, max_steps=3)
        for matches in ((), [Match("hidden", projection=True, weight=0.0)])
    ]
    assert_equal(weights(runs[1].model), weights(runs[0].model))


# Projections, and resuming


def test_projections_are_trained_at_their_own_rate(tmp_path):
    student, teacher = tiny_bert(hidden=16, **SPREAD), tiny_bert(seed=1, **SPREAD)
    trainer = trainer_of(tmp_path, student, teacher, PROJECTED, max_steps=1, weight_decay=0.5)
    before = {name: w.detach().clone() for name, w in trainer.matching.projections.weights.items()}
    assert {name: w.shape for name, w in before.items()} == {
        "hidden.0": (32, 16),
        "hidden.1": (32, 16),
        "embeddings.0": (32, 16),
    }
    for weight in before.values():
        torch.testing.assert_close(weight.T @ weight, torch.eye(16))
    trainer.train()
    for name, weight in trainer.matching.projections.weights.items():
        # The first step of Adam is of the size of its rate.
        moved = (weight - before[name]).abs().median().item()
        assert moved == pytest.approx(0.05 if "hidden" in name else 0.01, rel=0.05), name
    groups = trainer.optimizer.param_groups
    assert [group["weight_decay"] for group in groups][-3:] == [0.0] * 3


@pytest.mark.parametrize(
    ("matches", "teacher"),
    [
        (PROJECTED, {"hidden": 32}),
        ([Match("hidden", layers="closest", projection=True)], {"hidden": 32, "layers": 4}),
        ("mobilebert", {"hidden": 16, "layers": 4}),
    ],
)
def test_resuming_equals_never_having_stopped(tmp_path, matches, teacher):
    saving = {"save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}

    def build(seed):
        student = tiny_bert(layers=3, hidden=16, seed=seed, **SPREAD)
        example = tiny_bert(seed=1, **{"layers": 3, **SPREAD, **teacher})
        return trainer_of(tmp_path, student, example, matches, max_steps=5, **saving)

    whole = build(seed=0)
    whole.train()
    resumed = build(seed=3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_equal(weights(resumed.model), weights(whole.model))
    ours, theirs = resumed.matching.projections.weights, whole.matching.projections.weights
    assert_equal(dict(ours), dict(theirs))
    assert logged(resumed, "loss")[-1] == logged(whole, "loss")[-1]


def test_resuming_without_the_projections_is_refused(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2}
    student = tiny_bert(hidden=16)
    trained(tmp_path, student, tiny_bert(seed=1), (), **saving)
    again = trainer_of(tmp_path, student, tiny_bert(seed=1), PROJECTED, **saving)
    with pytest.raises(ValueError, match="but holds nothing: resume with the matches that"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_second_training_goes_on_with_the_projections(tmp_path):
    trainer = trained(tmp_path, tiny_bert(hidden=16, **SPREAD), tiny_bert(seed=1, **SPREAD), PROJECTED)
    groups = len(trainer.optimizer.param_groups)
    before = logged(trainer, "loss_hidden")
    trainer.train()
    assert len(trainer.optimizer.param_groups) == groups
    assert logged(trainer, "loss_hidden")[0] < before[0]


# Beside others


def test_with_pruning(tmp_path):
    trainer = trained(
        tmp_path,
        tiny_bert(**SPREAD),
        "self",
        "squarehead",
        max_steps=20,
        callbacks=[PruningCallback(sparsity=0.5, interval=2)],
    )
    losses = logged(trainer, "loss_hidden")
    assert losses[0] == pytest.approx(0, abs=1e-6)
    assert losses[-1] > 1e-5
    assert logged(trainer, "sparsity")[-1] == pytest.approx(0.5, abs=0.01)
    trainer.save_model(tmp_path / "sparse")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "sparse")
    zeros = [
        (p == 0).float().mean() for n, p in loaded.named_parameters() if n.endswith("query.weight")
    ]
    assert min(zeros) > 0.1


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated")
@pytest.mark.parametrize("matches", ["tinybert", "minilm"])
def test_activation_checkpointing_changes_nothing(tmp_path, matches):
    runs = [
        trained(
            tmp_path,
            tiny_bert(**SPREAD),
            tiny_bert(layers=4, seed=1, **SPREAD),
            matches,
            gradient_checkpointing=checkpointing,
        )
        for checkpointing in (False, True)
    ]
    for name in ("loss", "grad_norm", "loss_attention"):
        assert logged(runs[1], name) == pytest.approx(logged(runs[0], name), rel=1e-5), name


def test_dropout_in_the_maps_leaves_them_finite(tmp_path):
    student = tiny_llama(attention_dropout=0.5, **SPREAD)
    rows = language_rows()
    trainer = trained(tmp_path, student, tiny_llama(seed=1, **SPREAD), "minilm", rows)
    assert all(0 < loss < 10 for loss in logged(trainer, "loss_attention"))


@pytest.mark.parametrize("matches", ["tinybert", "minilm"])
def test_mixed_precision_changes_the_loss_by_rounding_only(tmp_path, matches):
    runs = [
        trained(
            tmp_path, tiny_bert(**SPREAD), tiny_bert(layers=4, seed=1, **SPREAD), matches, bf16=bf16
        )
        for bf16 in (False, True)
    ]
    for name in (f"loss_{name}" for name in runs[0].matching.weights):
        ours, theirs = logged(runs[1], name)[0], logged(runs[0], name)[0]
        assert ours == pytest.approx(theirs, rel=0.05), name


def test_an_adapted_student_matches_inside_its_base(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    student = peft.get_peft_model(tiny_bert(**SPREAD), config)
    base = copy.deepcopy(weights(student))
    trainer = trained(tmp_path, student, tiny_bert(layers=4, seed=1, **SPREAD), "mobilebert")
    assert min(logged(trainer, "loss_attention")) > 0
    for name, value in trainer.model.state_dict().items():
        moved = not torch.equal(value, base[name])
        assert moved == ("lora_" in name or "modules_to_save" in name), name


def test_closest_layers_are_found(tmp_path):
    """The student is the teacher with its layers in the other order."""
    teacher = tiny_bert(layers=3, **SPREAD).eval()
    student = copy.deepcopy(teacher)
    match = Match("hidden", layers="closest")
    trainer = trainer_of(tmp_path, student, teacher, [match], max_steps=2, learning_rate=0.0)
    (closest,) = trainer.matching._closest.values()
    closest.chosen = torch.tensor([2, 0, 1])
    trainer.train()
    assert closest.chosen.tolist() == [0, 1, 2]
    losses = logged(trainer, "loss_hidden")
    assert losses[0] > 0.1
    assert losses[1] == pytest.approx(0, abs=1e-6)


def test_a_layer_that_pruning_has_emptied_is_no_longer_compared(tmp_path):
    """It hands on what it gets, so that the layer before it is as close."""
    teacher = tiny_llama(layers=3, **SPREAD).eval()
    student = copy.deepcopy(teacher)
    trainer = trainer_of(
        tmp_path,
        student,
        teacher,
        [Match("hidden", layers="closest")],
        language_rows(),
        max_steps=2,
        learning_rate=0.0,
    )
    for part in (student.model.layers[1].self_attn.o_proj, student.model.layers[1].mlp.down_proj):
        torch.nn.init.zeros_(part.weight)
    trainer.train()
    (closest,) = trainer.matching._closest.values()
    assert 1 not in closest.chosen
    assert closest.chosen[0] == 0


def test_a_compiled_student_gives_the_same(tmp_path):
    compiling = {"torch_compile": True, "torch_compile_backend": "eager"}
    runs = [
        trained(
            tmp_path,
            tiny_bert(**SPREAD),
            tiny_bert(layers=4, seed=1, **SPREAD),
            "mobilebert",
            max_steps=2,
            **settings,
        )
        for settings in ({}, compiling)
    ]
    assert hasattr(runs[1].model_wrapped, "_orig_mod")
    for name in ("loss", "grad_norm", *(f"loss_{name}" for name in runs[0].matching.weights)):
        assert logged(runs[1], name) == pytest.approx(logged(runs[0], name), rel=1e-5), name
