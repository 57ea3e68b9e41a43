"""The folder: written whole and once, or not at all."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from publishing.runs import WRITTEN, never, read
from tiny import tiny_bert

from hf_compress import publish


def test_one_folder_holds_all_and_nothing_more(published):
    names = {file.name for file in published.iterdir()}
    pictures = {"sparsity.png", "layers.png", "weights.png", "size_and_score.png"}
    assert names == WRITTEN | pictures | {"tokenizer.json", "tokenizer_config.json"}
    assert [file.name for file in published.parent.iterdir()] == [published.name]
    for name in pictures:
        assert (published / name).read_bytes().startswith(b"\x89PNG")
    assert "/tmp" not in (published / "report.json").read_text()


def test_a_second_result_takes_the_place_of_the_first(trained, tmp_path):
    (tmp_path / "out").mkdir()
    for name in ("me/first", "me/second"):
        publish(trained, name, folder=tmp_path / "out", push=False)
        (tmp_path / "out" / "stray").touch()
    (tmp_path / "out" / "stray").unlink()
    assert read(tmp_path / "out")["name"] == "me/second"
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_an_interrupt_leaves_nothing_behind(tmp_path):
    def evaluate(model):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        publish(tiny_bert(), folder=tmp_path / "out", evaluate=evaluate)
    assert list(tmp_path.iterdir()) == []
    # What a killed process left is cleared away.
    (tmp_path / ".out.unfinished").mkdir()
    (tmp_path / ".out.unfinished" / "half").touch()
    publish(tiny_bert(), folder=tmp_path / "out")
    assert {file.name for file in (tmp_path / "out").iterdir()} == WRITTEN


def test_folders_that_cannot_take_it_are_refused_before_any_work(tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "report.json").write_text('{"of": "someone else"}')
    (tmp_path / "file").touch()
    for name, error in (("theirs", FileExistsError), ("file", FileExistsError), ("file/out", OSError)):
        with pytest.raises(error, match=r"another `folder`|cannot be written"):
            publish(tiny_bert(), folder=tmp_path / name, evaluate=never)
    assert {file.name for file in tmp_path.iterdir()} == {"theirs", "file"}


TWO_RANKS = """
import sys
from tiny import classification_rows, tiny_bert
from transformers import Trainer, TrainingArguments
from hf_compress import publish

run, out, taken = sys.argv[1:]
args = TrainingArguments(
    run, max_steps=2, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True
)
data = classification_rows(24)
score = lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())}
trainer = Trainer(tiny_bert(), args, train_dataset=data, eval_dataset=data, compute_metrics=score)
trainer.train()
publish(trainer, folder=out, baseline=tiny_bert(seed=1))
try:
    publish(trainer, folder=taken)
except (FileExistsError, RuntimeError) as error:
    print("refused", args.process_index, type(error).__name__, flush=True)
trainer.end()
"""


@pytest.mark.slow
def test_two_ranks_write_once_and_fail_together(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO_RANKS)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    run = subprocess.run(
        [sys.executable, *launch, script, tmp_path / "run", tmp_path / "out", script],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(Path(tiny.__file__).parent), "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert "refused 0 FileExistsError" in run.stdout
    assert "refused 1 RuntimeError" in run.stdout
    report = read(tmp_path / "out")
    assert report["recipe"]["training"]["processes"] == 2
    # Of this head Trainer reports twice the loss on two processes.
    assert report["dense"]["metrics"].keys() == {"accuracy"}
