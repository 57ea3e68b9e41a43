"""The command on a small real slice: a tiny BERT with the tokenizer of all-MiniLM-L6-v2 on R8."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from hf_compress.cli.compress import main
from hf_compress.samples import corpus

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(classifier):
    return classifier


def flags(model, output):
    settings = {
        "model": model,
        "dataset": "reuters-r8",
        "output_dir": str(output),
        "max_steps": 8,
        "max_train_rows": 64,
        "max_eval_rows": 32,
        "max_length": 16,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "sparsity": 0.75,
        "interval": 2,
    }
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def sparsity_of(folder):
    tensors = load_file(folder / "model.safetensors")
    backbone = [n for n in tensors if ".layer." in n or ".pooler." in n]
    targets = [tensors[n] for n in backbone if tensors[n].dim() == 2]
    return sum(int((t == 0).sum()) for t in targets) / sum(t.numel() for t in targets)


def test_prune_and_distil(model, tmp_path):
    more = ["--student_layers", "2", "--teacher", model, "--alpha", "0.5"]
    main([*flags(model, tmp_path), *more])
    assert sparsity_of(tmp_path) == pytest.approx(0.75, abs=1e-3)
    results = json.loads((tmp_path / "eval_results.json").read_text())
    assert {"eval_accuracy", "eval_loss_kd", "eval_agreement"} <= set(results)
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert history
    assert json.loads((tmp_path / "config.json").read_text())["num_hidden_layers"] == 2
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["dense_name"].startswith("the teacher")
    assert report["dense"]["parameters"] > report["compressed"]["parameters"]


def test_rows_of_your_own_in_a_csv(model, tmp_path):
    rows = corpus("reuters-r8")["train"].select(range(40))
    names = rows.features["label"].names
    rows = rows.map(lambda row: {"topic": names[row["label"]]}, remove_columns="label")
    rows.to_csv(tmp_path / "rows.csv")
    words = flags(model, tmp_path / "out")
    words[words.index("--dataset") + 1] = str(tmp_path / "rows.csv")
    with pytest.raises(ValueError, match="no column 'label', only.*topic"):
        main(words)
    # The head of this model has 8 classes; the rows have fewer, so it is made anew.
    main([*words, "--label_column", "topic"])
    assert sparsity_of(tmp_path / "out") == pytest.approx(0.75, abs=1e-3)


def test_prunes_a_causal_language_model(language_model, tmp_path):
    main([*flags(language_model, tmp_path), "--task", "causal-lm", "--teacher", "self"])
    results = json.loads((tmp_path / "eval_results.json").read_text())
    assert 1 < results["eval_loss_task"] < 20
    assert json.loads((tmp_path / "report.json").read_text())["metric"] == "perplexity"
    tensors = load_file(tmp_path / "model.safetensors")
    pruned = [tensor for name, tensor in tensors.items() if ".layers." in name and tensor.dim() == 2]
    total = sum(tensor.numel() for tensor in pruned)
    assert sum(int((tensor == 0).sum()) for tensor in pruned) == round(0.75 * total)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--sparsity", "80"), "pass 0.8"),
        (("--eval_split", "train", "--max_eval_rows", "0"), "eval split.*is empty"),
        (("--max_train_rows", "0"), "train split.*is empty"),
        (("--train_split", "training"), "no split 'training'"),
        (("--text_column", "words"), "no column 'words'"),
        (("--schedule", "fast"), "allowed are"),
        (("--student_layers", "9"), "pass 1 to 4"),
    ],
)
def test_refusals(model, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        main([*flags(model, tmp_path), *change])
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_folder_that_cannot_be_written_is_refused(model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write to output_dir"):
        main(flags(model, tmp_path / "file" / "out"))


def break_off(name):
    def do(checkpoint):
        whole = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(whole[: len(whole) // 2])

    return do


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    output = tmp_path_factory.mktemp("stopped")
    main([*flags(model, output), "--save_strategy", "steps", "--save_steps", "4"])
    return output / "checkpoint-4"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_off("model.safetensors"), "model.safetensors is damaged"),
        (break_off("optimizer.pt"), "optimizer.pt is damaged"),
        (break_off("trainer_state.json"), "trainer_state.json is damaged"),
        (lambda folder: (folder / "trainer_state.json").unlink(), "no checkpoint to resume from"),
        # Trainer itself would go on with a fresh optimizer.
        (lambda folder: (folder / "optimizer.pt").unlink(), "knows nothing of this pruning"),
    ],
)
def test_a_corrupt_checkpoint_is_refused(model, checkpoint, tmp_path, damage, message):
    copy = tmp_path / "checkpoint-4"
    shutil.copytree(checkpoint, copy)
    damage(copy)
    with pytest.raises(ValueError, match=message):
        main([*flags(model, tmp_path / "out"), "--resume_from_checkpoint", str(copy)])


def test_resumes_to_the_same_weights(model, checkpoint, tmp_path):
    main([*flags(model, tmp_path / "out"), "--resume_from_checkpoint", str(checkpoint)])
    resumed = load_file(tmp_path / "out" / "model.safetensors")
    straight = load_file(checkpoint.parent / "model.safetensors")
    assert all(resumed[name].equal(weight) for name, weight in straight.items())


SCRIPT = str(ROOT / "scripts" / "compress.py")
ACCELERATE = [
    *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def launch(launcher, words):
    return subprocess.run(
        [sys.executable, *launcher, SCRIPT, *words],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )


@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param(ACCELERATE, id="accelerate"),
        pytest.param(TORCHRUN, id="torchrun", marks=pytest.mark.slow),
    ],
)
def test_two_processes_write_once(model, tmp_path, launcher):
    run = launch(launcher, flags(model, tmp_path))
    assert run.returncode == 0, run.stderr[-3000:]
    assert sparsity_of(tmp_path) == pytest.approx(0.75, abs=1e-3)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["recipe"]["training"]["processes"] == 2
    assert (tmp_path / "README.md").is_file()
    assert run.stdout.count("model, card and report are in") == 1


def test_processes_that_did_not_find_each_other_are_stopped(model, tmp_path):
    words = flags(model, tmp_path)
    place = words.index("--use_cpu")
    run = launch(ACCELERATE, words[:place] + words[place + 2 :])
    assert run.returncode != 0
    (line,) = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    assert "pass --use_cpu" in line
    assert not list(tmp_path.glob("*.safetensors"))
