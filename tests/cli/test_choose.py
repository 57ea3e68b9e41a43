"""`choose` from a csv to a published winner: a tiny BERT with a small vocabulary of its own, on rows of
Reuters in two classes."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification
from vocabularies import wordpiece

from hf_compress.cli.choose import is_full_disk, main
from hf_compress.cli.errors import UserError
from hf_compress.measure import bytes_on_disk
from hf_compress.publishing.validate import validate
from hf_compress.samples import corpus

ROOT = Path(__file__).parents[2]
SPACE = {"layers": [None, 1], "ffn": [0, 0.5], "vocabulary": True, "bits": [None, 8]}


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Folder with a model of 3 layers, rows.csv and space.yaml."""
    folder = tmp_path_factory.mktemp("given")
    tokenizer = wordpiece()
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=128,
        max_position_embeddings=32,
        num_labels=2,
        pad_token_id=tokenizer.pad_token_id,
    )
    BertForSequenceClassification(config).save_pretrained(folder / "model")
    rows = corpus("reuters-r8")["train"]
    names = rows.features["label"].names
    kept = [names.index("earn"), names.index("acq")]
    rows = rows.filter(lambda row: row["label"] in kept).shuffle(seed=0).select(range(160))
    rows = rows.map(lambda row: {"topic": names[row["label"]]}, remove_columns="label")
    rows.to_csv(folder / "rows.csv")
    (folder / "space.yaml").write_text(yaml.safe_dump(SPACE))
    return folder


def words(given, output, **more):
    settings = {
        "model": given / "model",
        "dataset": given / "rows.csv",
        "label_column": "topic",
        "output_dir": output,
        "space": given / "space.yaml",
        "max_length": 16,
        "dense_epochs": 4,
        "max_steps": 30,
        "learning_rate": 3e-3,
        "per_device_train_batch_size": 16,
        "use_cpu": True,
        "finalists": 2,
    } | more
    flags = ((f"--{name}", str(value)) for name, value in settings.items() if value is not None)
    return [word for pair in flags for word in pair]


def told(folder):
    return json.loads((folder / "choice.json").read_text())


def written(folder):
    """When each record, and the weights of each finalist, were written."""
    files = [*folder.glob("records/*/*.json"), *folder.glob("finalists/*/model.safetensors")]
    return {file.relative_to(folder): file.stat().st_mtime_ns for file in files}


def scores(folder):
    """All that a search found and that no clock has a part in."""
    found = told(folder)
    return found["winner"], {
        each["name"]: (
            [(t["steps"], t["score"]) for t in each["trainings"]],
            each["finished"] and (each["finished"]["validation"], each["finished"]["digest"]),
        )
        for each in found["tried"]
    }


@pytest.fixture(scope="module")
def searched(given, tmp_path_factory):
    """A search that may lose anything, and so finds the smallest."""
    folder = tmp_path_factory.mktemp("searched")
    main(words(given, folder, max_drop=100))
    return folder


@pytest.fixture
def again(searched, tmp_path):
    """A copy of it, to go on from."""
    return Path(shutil.copytree(searched, tmp_path / "out"))


def test_where_any_loss_is_allowed_the_smallest_wins(searched):
    found = told(searched)
    sizes = {each["name"]: each["predicted"]["bytes"] for each in found["tried"]}
    assert len(sizes) == 8
    assert found["winner"] == min(sizes, key=sizes.get) == "1layers-ffn0.5-vocabulary-8bit"
    trained = [each for each in found["tried"] if each["finished"]]
    assert len(trained) == 2
    for each in trained:
        # The prediction of the size is no estimate.
        assert each["finished"]["measured"]["bytes"] == each["predicted"]["bytes"]
        assert bytes_on_disk(searched / "finalists" / each["name"]) == each["predicted"]["bytes"]
    stopped = [each for each in found["tried"] if not each["finished"]]
    assert all([t["steps"] for t in each["trainings"]] == [10] for each in stopped)
    assert 0 < found["seconds"]["share_saved"] < 1


def test_the_winner_is_published_with_the_table(searched):
    winner = searched / "winner"
    validate(winner)
    card, found = (winner / "README.md").read_text(), told(searched)
    assert found["sentence"] in card
    assert "A tenth" not in card
    assert "chose nothing" in card
    for row in found["table"]:
        assert "| " + " | ".join(row) + " |" in card
    assert (winner / "choice.png").stat().st_size > 10_000
    model = AutoModelForSequenceClassification.from_pretrained(winner)
    assert model.config.num_hidden_layers == 1
    # Of a finalist that did not win there is the model and its own card.
    assert all("Why this one" not in p.read_text() for p in searched.glob("finalists/*/README.md"))


def test_other_limits_begin_with_what_is_known_and_have_other_answers(given, again):
    before = written(again)
    sizes = {each["name"]: each["predicted"]["bytes"] for each in told(again)["tried"]}
    limit = sorted(sizes.values())[3]
    main(words(given, again, max_size=f"{limit}B"))
    found = told(again)
    fits = {name for name, size in sizes.items() if size <= 1.1 * limit}
    assert 4 <= len(fits) < 8
    assert {each["name"] for each in found["tried"] if each["trainings"] or each["finished"]} <= fits
    finished = {each["name"]: each["finished"] for each in found["tried"] if each["finished"]}
    within = {n: f["validation"] for n, f in finished.items() if sizes[n] <= limit}
    best = max(within.values())
    assert found["winner"] == min((n for n in within if within[n] == best), key=sizes.get)
    now = written(again)
    assert all(now[name] == when for name, when in before.items())

    dense = found["dense"]["validation"]
    main(words(given, again, max_drop=0))
    found = told(again)
    finished = {each["name"]: each["finished"] for each in found["tried"] if each["finished"]}
    good = [name for name, each in finished.items() if each["validation"] >= dense]
    assert found["winner"] == min(good, key=sizes.get)


def test_what_an_earlier_call_finished_counts(given, again):
    first = {each["name"] for each in told(again)["tried"] if each["finished"]}
    main(words(given, again, max_drop=100, finalists=3))
    second = {each["name"] for each in told(again)["tried"] if each["finished"]}
    assert first < second
    before = written(again)
    main(words(given, again, max_drop=100))
    found = told(again)
    assert {each["name"] for each in found["tried"] if each["finished"]} == second
    assert all(written(again)[name] == when for name, when in before.items())
    # Without the files of one it is no finalist: it is stopped where it was, and not trained again.
    other = min(second - first)
    shutil.rmtree(again / "finalists" / other)
    main(words(given, again, max_drop=100))
    assert {each["name"] for each in told(again)["tried"] if each["finished"]} == second - {other}


def test_nothing_that_fits_publishes_nothing(given, again, capsys):
    with pytest.raises(UserError, match="The one that binds is `size`: 8 of 8.*nearest is 1layers"):
        main(words(given, again, max_size="1kB"))
    assert not (again / "winner").exists()
    assert told(again)["winner"] is None
    assert "at most 0.001 MB" in capsys.readouterr().out


def test_that_nothing_known_is_used_is_said_once(given, again, capsys):
    for said in (True, False):
        with pytest.raises(UserError, match="`size`"):
            main(words(given, again, max_size="1kB", learning_rate=1e-3))
        assert ("is not used" in capsys.readouterr().out) == said


def launch(flags, **more):
    script = str(ROOT / "scripts" / "choose.py")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, script, *flags], text=True, env=env, **more)


@pytest.mark.slow
def test_after_kill_9_it_goes_on_to_the_same_and_trains_nothing_twice(given, searched, tmp_path):
    flags = words(given, tmp_path, max_drop=100)
    process = launch(flags, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(list(tmp_path.glob("records/*/*.10steps.json"))) < 3:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = written(tmp_path)
    assert not (tmp_path / "choice.json").exists()
    main(flags)
    now = written(tmp_path)
    assert all(now[name] == when for name, when in before.items())
    assert scores(tmp_path) == scores(searched)


@pytest.mark.slow
def test_a_finalist_whose_file_was_cut_is_made_again(given, again):
    before, expected = written(again), scores(again)
    cut = again / "finalists" / "1layers-ffn0.5-vocabulary-8bit" / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:1000])
    main(words(given, again, max_drop=100))
    assert scores(again) == expected
    changed = {name.name for name, when in written(again).items() if before.get(name) != when}
    assert changed == {"model.safetensors", "1layers-ffn0.5-vocabulary-8bit.finished.json"}


@pytest.mark.slow
def test_a_full_disk_is_told_with_the_way_on(given, tmp_path):
    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))

    process = launch(
        words(given, tmp_path, max_drop=100),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        preexec_fn=limited,
    )
    _, errors = process.communicate()
    assert process.returncode == 2, errors[-3000:]
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert "make room. The same command then goes on from here" in line
    assert not (tmp_path / "dense").exists()


def test_how_a_full_disk_is_known():
    assert is_full_disk(OSError(28, "No space left on device"))
    assert is_full_disk(RuntimeError("Error while serializing: I/O error: ... (os error 28)"))
    assert not is_full_disk(OSError(2, "No such file"))
    assert not is_full_disk(RuntimeError("os error 280"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_drop": None}, "no limit was given"),
        ({"max_drop": -1}, "`drop` is -1"),
        ({"max_size": "40"}, "`max_size` is '40': write a number and its unit"),
        ({"max_size": "40 miles"}, "`max_size` is '40 miles'"),
        ({"max_latency": "20MB"}, "`max_latency` is '20MB'.*us, ms, s"),
        ({"max_memory": "0GB"}, "`memory` is 0"),
        ({"min_speedup": 0}, "`speedup` is 0"),
        ({"space": "missing.yaml"}, "no space at missing.yaml"),
        ({"space": "{layer: [1]}"}, "unknown keys"),
        ({"space": "{bits: [1]}"}, "`bits` is 1"),
        ({"space": "[]"}, "the space is empty"),
        ({"space": "{layers: [1"}, "is not valid yaml"),
        ({"space": "{layers: 9}"}, "candidate 9layers of the space: .*9"),
        ({"space": "{heads: 0.3}"}, "candidate heads0.3 of the space"),
        ({"finalists": 0}, "`finalists` is 0"),
        ({"dense_epochs": 0}, "`dense_epochs` is 0"),
        ({"metric": "perplexity"}, "`metric` is 'perplexity'; for this task there is accuracy"),
        ({"label_column": "label"}, "no column 'label', only"),
        ({"max_train_rows": 1}, "too few rows"),
        ({"push_to_hub": True}, "`push_to_hub` needs `hub_model_id`"),
        ({"prefer": "cheap"}, "invalid choice: 'cheap'"),
        ({"sparsity": 0.5}, "is no flag of this command"),
    ],
)
def test_refusals(given, tmp_path, change, message):
    space = change.get("space", "")
    if space[:1] in ("{", "["):
        (tmp_path / "space.yaml").write_text(space)
        change = {"space": tmp_path / "space.yaml"}
    with pytest.raises(UserError, match=message):
        main(words(given, tmp_path / "out", **{"max_drop": 1} | change))
    assert not (tmp_path / "out" / "records").exists()
