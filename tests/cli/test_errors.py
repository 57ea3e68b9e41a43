"""A user's mistake ends in one line and status 2; a bug keeps its traceback."""

import json

import pytest
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_compress.cli import compress, errors, oneshot, structure, verify
from hf_compress.cli.errors import FirstStep, UserError, refusing_until, run


def flags(model, output):
    words = ["--model", str(model), "--dataset", "reuters-r8", "--output_dir", str(output)]
    words += ["--max_train_rows", "16", "--max_eval_rows", "8", "--max_length", "16"]
    return [*words, "--max_steps", "2", "--use_cpu", "--report_to", "none", "--save_strategy", "no"]


@pytest.fixture(scope="module")
def other_labels(classifier, tmp_path_factory):
    folder = tmp_path_factory.mktemp("other")
    model = AutoModelForSequenceClassification.from_pretrained(
        classifier, num_labels=3, ignore_mismatched_sizes=True
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(classifier).save_pretrained(folder)
    return str(folder)


def told(capsys, command, words):
    """The line that ends the program."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run(command, words)
    assert end.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert sum(line.startswith("error: ") for line in lines) == 1
    assert not any("Traceback" in line for line in lines)
    return lines[-1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--sparsity", "80"), "pass 0.8"),
        (("--sparsity", "a lot"), "argument --sparsity: invalid float value: 'a lot'"),
        (("--sparsty", "0.8"), "'--sparsty' is no flag"),
        (("--sparsity", "0.8", "--text_column", "words"), "has no column 'words'"),
        (("--sparsity", "0.8", "--model", "no/model"), "no/model"),
        (("--sparsity", "0.8", "--dataset", "no/data"), "no/data"),
        (("--sparsity", "0.8", "--max_length", "513"), "is for at most 512 tokens"),
        # Only the training itself can tell these, before its first step.
        (("--sparsity", "0.8", "--targets", "querry"), "querry"),
        (("--method", "keep"), "there is no zero to keep"),
    ],
)
def test_compress(classifier, tmp_path, capsys, monkeypatch, change, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert message in told(capsys, compress.main, [*flags(classifier, tmp_path), *change])
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_teacher_with_other_labels(classifier, other_labels, tmp_path, capsys):
    line = told(capsys, compress.main, [*flags(classifier, tmp_path), "--teacher", other_labels])
    assert "teacher" in line
    assert "labels" in line


def test_recipes_and_files(classifier, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("sparsty: 0.8\n")
    words = flags(classifier, tmp_path / "out")
    assert "unknown keys ['sparsty']" in told(capsys, compress.main, [*words, "--config", str(recipe)])
    rows = tmp_path / "rows.csv"
    rows.write_text('text,label\na,1\nb,1,2,3,"\n')
    words[words.index("--dataset") + 1] = str(rows)
    assert "rows.csv cannot be read" in told(capsys, compress.main, [*words, "--sparsity", "0.8"])


@pytest.mark.parametrize("command", [oneshot, structure])
def test_commands_that_do_not_train(classifier, tmp_path, capsys, command):
    words = [
        "--model",
        str(tmp_path / "none"),
        "--dataset",
        "reuters-r8",
        "--output_dir",
        str(tmp_path),
    ]
    words += ["--dataset", "reuters-r8"]
    more = ["--sparsity", "0.5"] if command is oneshot else ["--ffn", "0.5"]
    assert str(tmp_path / "none") in told(capsys, command.main, [*words, *more])


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ValueError, match="invalid literal") as raised:
        run(lambda words: print(int(words[0])), ["x"])
    assert not isinstance(raised.value, UserError)


@pytest.mark.parametrize(("begun", "kind"), [(False, UserError), (True, ValueError)])
def test_in_a_training_only_what_comes_before_the_first_step_is_a_refusal(begun, kind):
    first_step = FirstStep()
    if begun:
        first_step.on_step_begin()
    with pytest.raises(ValueError, match="odd") as raised, refusing_until(first_step):
        raise ValueError("odd")
    assert type(raised.value) is kind


def test_other_processes_let_the_main_one_tell(monkeypatch, capsys):
    waited = []
    monkeypatch.setattr(errors.time, "sleep", waited.append)
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert "'--qqq' is no flag" in told(capsys, compress.main, ["--model", "m", "--qqq"])
    assert waited == [errors.GRACE]


def test_the_card_of_a_run(classifier, tmp_path, capsys):
    output = tmp_path / "small"
    compress.main([*flags(classifier, output), "--sparsity", "0.75"])
    report = json.loads((output / "report.json").read_text())
    assert report["audit"]["target_sparsity"] == pytest.approx(0.75, abs=1e-3)
    assert (report["dataset"]["split"], report["dataset"]["rows"]) == ("test", 8)
    # The dense model is the one that was given, not the one that was trained.
    assert report["dense"]["nonzeros"] > report["compressed"]["nonzeros"]
    results = json.loads((output / "eval_results.json").read_text())
    assert report["compressed"]["metrics"]["accuracy"] == pytest.approx(results["eval_accuracy"])
    assert "# small\n" in (output / "README.md").read_text()
    assert {"model.safetensors", "trainer_state.json", "sparsity.png"} <= {
        file.name for file in output.iterdir()
    }
    assert not (output / "small").exists()
    table = capsys.readouterr().out
    assert f"{report['compressed']['nonzeros']:,}" in table
    # The report says how its rows were made, so they can be made again.
    with pytest.raises(SystemExit) as ended:
        verify.main([str(output)])
    checked = {
        line.split("  ")[0]: line.split()[-1] for line in capsys.readouterr().out.splitlines() if line
    }
    assert (ended.value.code, checked["compressed: accuracy"]) == (0, "yes")
    # A second run writes over the first.
    compress.main([*flags(classifier, output), "--sparsity", "0.5"])
    report = json.loads((output / "report.json").read_text())
    assert report["audit"]["target_sparsity"] == pytest.approx(0.5, abs=1e-3)
