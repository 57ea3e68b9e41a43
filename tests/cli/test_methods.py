"""The methods of `compress`: each run for real, and what does not go with them refused."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from hf_compress.cli.arguments import CompressArguments
from hf_compress.cli.compress import main
from hf_compress.cli.methods import pruning_callback
from hf_compress.cli.oneshot import main as prune_oneshot
from hf_compress.cli.recipe import parse
from hf_compress.distillation.arguments import DistillationArguments
from hf_compress.schedules import Drop

RECIPES = Path(__file__).parents[2] / "scripts" / "recipes"


def flags(model, output):
    settings = {
        "model": model,
        "dataset": "reuters-r8",
        "output_dir": str(output),
        "max_train_rows": 64,
        "max_eval_rows": 32,
        "max_length": 16,
        "per_device_train_batch_size": 8,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def targets(folder):
    tensors = load_file(Path(folder) / "model.safetensors")
    backbone = [name for name in tensors if ".layer." in name or ".pooler." in name]
    return {name: tensors[name] for name in backbone if tensors[name].dim() == 2}


def test_the_recipe_of_two_of_four(classifier, tmp_path):
    main(["--config", str(RECIPES / "prune24.yaml"), *flags(classifier, tmp_path)])
    weights = targets(tmp_path)
    assert len(weights) == 25
    assert all(((w.reshape(-1, 4) != 0).sum(1) <= 2).all() for w in weights.values())
    # Not by zeroing everything.
    assert all((w != 0).float().mean() > 0.45 for w in weights.values())


def test_the_recipe_of_rigl_with_distillation(classifier, tmp_path):
    recipe = ["--config", str(RECIPES / "rigl80_distill.yaml"), "--interval", "4"]
    main([*recipe, *flags(classifier, tmp_path), "--logging_steps", "1"])
    results = json.loads((tmp_path / "eval_results.json").read_text())
    assert {"eval_accuracy", "eval_loss_kd", "eval_agreement"} <= set(results)
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    logged = {round(row["sparsity"], 3) for row in history if "sparsity" in row}
    assert logged == {0.8}  # from the first step on
    dense = targets(classifier)
    moved = 0
    for name, weight in targets(tmp_path).items():
        assert int((weight == 0).sum()) == round(0.8 * weight.numel())
        lowest = dense[name].abs().flatten().sort().values[round(0.8 * weight.numel())]
        moved += int(((weight != 0) & (dense[name].abs() < lowest)).sum())
    assert moved > 0  # what magnitude pruned at first has come back elsewhere


def test_zeros_are_kept_while_the_rest_is_trained(classifier, tmp_path):
    words = ["--model", classifier, "--output_dir", str(tmp_path / "sparse"), "--score", "magnitude"]
    prune_oneshot([*words, "--sparsity", "0.6"])
    given = flags(str(tmp_path / "sparse"), tmp_path / "trained")
    main([*given, "--max_steps", "6", "--method", "keep", "--teacher", classifier])
    before, after = targets(tmp_path / "sparse"), targets(tmp_path / "trained")
    for name, weight in after.items():
        assert ((weight == 0) == (before[name] == 0)).all()
        assert not weight.equal(before[name])


def test_there_must_be_zeros_to_keep(classifier, tmp_path):
    with pytest.raises(ValueError, match="there is no zero to keep"):
        main([*flags(classifier, tmp_path), "--max_steps", "6", "--method", "keep"])


def described(tmp_path, *words):
    named = ["--model", "no/model", "--dataset", "no/data", "--output_dir", str(tmp_path)]
    callback = pruning_callback(*parse([*named, *words], CompressArguments, DistillationArguments))
    return None if callback is None else callback.describe()


def test_a_recipe_says_when_to_hold(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "sparsity: 0.8\neval_strategy: epoch\nhold_when: {metric: accuracy, by: 0.01}\n"
        "step_back_when:\n  metric: loss\n  by: 1\n  greater_is_better: false\n"
    )
    found = described(tmp_path, "--config", str(recipe))
    assert found["hold_when"] == vars(Drop(metric="accuracy", by=0.01))
    assert found["step_back_when"] == vars(Drop(metric="loss", by=1, greater_is_better=False))


def test_times_are_fractions_or_steps(tmp_path):
    found = described(tmp_path, "--sparsity", "0.8", "--start", "0.1", "--end", "200")
    assert (found["start"], found["end"]) == (0.1, 200)
    assert isinstance(found["end"], int)
    found = described(tmp_path, "--sparsity", "0.8", "--end", "1")
    assert isinstance(found["end"], float)


def test_what_is_not_given_is_as_in_the_callback(tmp_path):
    assert described(tmp_path, "--method", "rigl", "--sparsity", "0.8")["end"] == 0.75
    assert described(tmp_path, "--sparsity", "0.8")["end"] == 0.6
    assert described(tmp_path, "--pattern", "2:4")["sparsity"] == 0.5
    assert described(tmp_path, "--teacher", "self") is None


RIGL = ("--method", "rigl", "--sparsity", "0.8")
HOLD = ("--sparsity", "0.8", "--eval_strategy", "epoch", "--hold_when")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "nothing to do"),
        (("--method", "gradual"), "give `sparsity`"),
        (("--score", "wanda"), "give `sparsity`"),
        (("--sparsity", "0.8", "--score", "best"), "score"),
        (("--sparsity", "0.8", "--scope", "everywhere"), "scope"),
        (("--pattern", "2x"), "`pattern` is '2x'; allowed are"),
        (("--pattern", "4:2"), "it prunes nothing"),
        (("--pattern", "2:4", "--sparsity", "0.75"), "means 0.5: leave `sparsity` out"),
        (("--sparsity", "0.8", "--end", "1.5"), "`end` is 1.5"),
        (("--sparsity", "0.8", "--start", "0.7", "--end", "0.2"), "swap them"),
        (("--sparsity", "0.8", "--interval", "0"), "`interval` is 0"),
        (("--sparsity", "0.8", "--min_keep", "2"), "`min_keep` is 2.0"),
        (("--sparsity", "0.8", "--fraction", "0.3"), "'gradual' does not take fraction"),
        (("--method", "rigl"), "method 'rigl' needs `sparsity`"),
        ((*RIGL, "--score", "obd"), "'rigl' does not take score"),
        ((*RIGL, "--pattern", "2:4", "--start", "0.1"), "'rigl' does not take pattern, start"),
        ((*RIGL, "--fraction", "30"), "`fraction` is 30.0"),
        (("--method", "keep", "--sparsity", "0.8"), "'keep' does not take sparsity, only targets"),
        ((*HOLD, "accuracy"), "write {metric: accuracy, by: 0.01}"),
        ((*HOLD, "{metric: accuracy"), "write {metric: accuracy, by: 0.01}"),
        ((*HOLD, "{metric: accuracy}"), "write {metric: accuracy, by: 0.01}"),
        ((*HOLD, "{metric: accuracy, by: a point}"), "write {metric: accuracy, by: 0.01}"),
        ((*HOLD, "{metric: accuracy, by: 0.01, when: now}"), "write {metric: accuracy, by: 0.01}"),
        ((*HOLD, "{metric: accuracy, by: -1}"), "`by` is -1"),
        ((*HOLD, "{metric: f1, by: 0.01}"), "'f1'; evaluations will have eval_loss, eval_accuracy"),
        ((*HOLD, "{metric: loss_kd, by: 1}"), "'loss_kd'; evaluations will have"),
        ((*HOLD, "{metric: accuracy, by: 0.01}", "--task", "causal-lm"), "will have eval_loss\\."),
        (
            (*HOLD, "{metric: loss, by: 1}", "--eval_strategy", "no"),
            "cannot be seen without evaluations",
        ),
        (("--sparsity", "0.8", "--teacher_bits", "8"), "no `teacher`"),
    ],
)
def test_refused_before_anything_is_loaded(tmp_path, words, message):
    named = ["--model", "no/model", "--dataset", "no/data", "--output_dir", str(tmp_path)]
    with pytest.raises(ValueError, match=message):
        main([*named, *words])
