"""`verify`: a true folder passes, and each kind of lie ends with status 1 and is named."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from publishing.runs import read, settings, tokenizer
from tiny import (
    classification_rows,
    image_rows,
    language_rows,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_mixtral,
    tiny_vit,
)
from transformers import AutoModelForSequenceClassification, Trainer

from hf_compress import PruningCallback, QuantizationCallback, load_quantized, publish
from hf_compress.cli.verify import main
from hf_compress.metrics.functions import accuracy
from hf_compress.publishing.card import render
from hf_compress.publishing.remeasure import within

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """File of the rows that the published model was evaluated on."""
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    classification_rows(40, seed=1).to_json(file)
    return str(file)


def verify(capsys, *words):
    """The exit status, and the verdict on each claim."""
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    lines = capsys.readouterr().out.splitlines()
    verdicts = {line.split("  ")[0].strip(): line.split()[-1] for line in lines if line.strip()}
    return ended.value.code, verdicts


def told_otherwise(folder, place, change):
    """A copy of `folder` whose report was changed, and its card written anew from that."""
    shutil.copytree(folder, place)
    report = read(place)
    change(report)
    (place / "report.json").write_text(json.dumps(report))
    pictures = sorted(file.name for file in place.glob("*.png"))
    (place / "README.md").write_text(render(report, pictures=pictures))
    return place


def test_a_true_folder_passes(published, rows, trained, tmp_path, capsys):
    status, found = verify(capsys, published, "--data", rows)
    assert status == 0
    assert "NO" not in found.values()
    checked = ("bytes on disk", "parameters", "non-zero parameters", "tensors as listed")
    assert {found[name] for name in (*checked, "compressed: accuracy", "compressed: loss_task")} == {
        "yes"
    }
    assert (found["compressed: agreement"], found["dense: accuracy"]) == ("-", "-")
    trained.teacher.save_pretrained(tmp_path / "dense")
    status, found = verify(capsys, published, "--data", rows, "--dense", tmp_path / "dense")
    assert (status, found["dense: accuracy"], found["dense: parameters"]) == (0, "yes", "yes")


def zeros(report):
    tensor = next(t for t in report["audit"]["tensors"].values() if t["zeros"] > 9)
    tensor["zeros"] += 1


def change(*path, by):
    def edit(report):
        for key in path[:-1]:
            report = report[key]
        report[path[-1]] += by

    return edit


LIES = {
    "a score": (change("compressed", "metrics", "accuracy", by=0.025), "compressed: accuracy"),
    "a loss": (change("compressed", "metrics", "loss_task", by=-0.01), "compressed: loss_task"),
    "bytes": (change("compressed", "bytes", by=-8), "bytes on disk"),
    "memory": (change("compressed", "weight_bytes", by=-8), "weights in memory, bytes"),
    "zeros": (zeros, "tensor bert"),
    "non-zeros": (change("compressed", "nonzeros", by=-1), "non-zero parameters"),
    "parameters": (change("compressed", "parameters", by=-1), "parameters"),
    "sparsity": (change("audit", "target_sparsity", by=0.01), "sparsity of the targeted weights"),
    "recovery": (change("recovery", "accuracy", by=1.0), "recovery of accuracy, %"),
    "tied": (lambda r: r["audit"]["tied"].update(a="b"), "second copies of tied tensors"),
    "bits": (lambda r: r.update(quantized=4), "bits of the packed weights"),
    "pattern": (
        lambda r: r["recipe"]["methods"][0].update(pattern="2:4"),
        "pruning: weights of pattern 2:4",
    ),
}


@pytest.mark.parametrize("what", LIES)
def test_a_lie_in_report_and_card_is_named(what, published, rows, tmp_path, capsys):
    edit, name = LIES[what]
    status, found = verify(capsys, told_otherwise(published, tmp_path / "lie", edit), "--data", rows)
    wrong = [claim for claim, verdict in found.items() if verdict == "NO"]
    assert status == 1
    assert any(claim.startswith(name) for claim in wrong), wrong


def test_a_digit_changed_on_the_card_alone_is_named(published, tmp_path, capsys):
    shutil.copytree(published, tmp_path / "lie")
    card = tmp_path / "lie" / "README.md"
    text = card.read_text()
    value = f"{read(published)['compressed']['parameters']:,}"
    assert text.count(value) == 1
    card.write_text(text.replace(value, value[:-1] + str(9 - int(value[-1]))))
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path / "lie")])
    assert ended.value.code == 1
    assert "parameters is '" in capsys.readouterr().out


@pytest.fixture(scope="module")
def on_grids(tmp_path_factory):
    """A model on integer grids of 4 bits, half of it zero, in 2:4, for each format."""
    trainer = Trainer(
        tiny_bert(),
        settings(tmp_path_factory.mktemp("run"), steps=6),
        train_dataset=classification_rows(),
        callbacks=[
            PruningCallback(pattern="2:4", interval=1, end=3),
            QuantizationCallback(4, group_size=16, grid="minmax", end=4),
        ],
    )
    trainer.train()
    place = tmp_path_factory.mktemp("grids")

    def publish_as(format):
        if format != "dense":
            pytest.importorskip(format.replace("-", "_"), reason=f"{format} is not installed")
        folder = place / format
        return folder if folder.exists() else publish(trainer, folder=folder, format=format)

    return publish_as


@pytest.mark.parametrize("format", ["dense", "compressed-tensors", "torchao"])
def test_integers_and_patterns_are_seen_in_the_files(format, on_grids, tmp_path, capsys):
    folder = on_grids(format)
    status, found = verify(capsys, folder)
    assert (status, found["pruning: weights of pattern 2:4"]) == (0, "yes")
    bits = {name: verdict for name, verdict in found.items() if name.endswith("4 bit: bits")}
    assert len(bits) > 3
    assert set(bits.values()) == {"yes"}

    def fewer(report):
        report["integers"]["bits"] = 3
        for kind in report["integers"]["kinds"]:
            kind["bits"] = 3
        for method in report["recipe"]["methods"]:
            method |= (
                {"quantized": dict.fromkeys(method["quantized"], 3)} if "quantized" in method else {}
            )

    status, found = verify(capsys, told_otherwise(folder, tmp_path / "lie", fewer))
    assert status == 1
    assert {v for name, v in found.items() if name.endswith("3 bit: bits")} == {"NO"}


@pytest.mark.parametrize("bits", [8, 4])
def test_weights_packed_by_bitsandbytes_are_opened(bits, tmp_path, capsys):
    pytest.importorskip("bitsandbytes")
    tiny_bert(hidden=64).save_pretrained(tmp_path / "dense")
    packed = load_quantized(tmp_path / "dense", bits, AutoModelForSequenceClassification)
    folder = publish(packed, folder=tmp_path / "out")
    status, found = verify(capsys, folder)
    assert (status, found["bits of the packed weights"], found["parameters"]) == (0, "yes", "yes")
    lie = told_otherwise(folder, tmp_path / "lie", lambda r: r.update(quantized=12 - bits))
    status, found = verify(capsys, lie)
    assert (status, found["bits of the packed weights"]) == (1, "NO")


def pruned_blocks():
    """Conv1D layers, and a grid that rounds more of the kept blocks to zero."""
    blocks = PruningCallback(0.5, pattern="4x1", interval=1, end=2)
    return tiny_gpt2(), language_rows(16), [blocks, QuantizationCallback(8, end=3)], "dense"


def packed_experts():
    callback = QuantizationCallback(4, group_size=16, grid="minmax")
    return tiny_mixtral(layers=1), language_rows(16), [callback], "compressed-tensors"


def rounded_inputs():
    rows = classification_rows(16)
    batch = rows.remove_columns("labels").with_format("torch")[:]
    callback = QuantizationCallback(8, activations=8, calibration=[batch], grid="minmax")
    return tiny_bert(), rows, [callback], "compressed-tensors"


def rows_of_two_lengths():
    """fc1 and fc2, which the card calls by one name, with a scale for each row of theirs."""
    return tiny_vit(), image_rows(16), [QuantizationCallback(8)], "compressed-tensors"


@pytest.mark.parametrize("made", [pruned_blocks, packed_experts, rounded_inputs, rows_of_two_lengths])
def test_what_is_stored_otherwise_than_it_computes_is_true_too(made, tmp_path, capsys):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    model, data, callbacks, format = made()
    trainer = Trainer(
        model,
        settings(tmp_path / "run", steps=4),
        train_dataset=data,
        eval_dataset=data,
        callbacks=callbacks,
    )
    trainer.train()
    folder = publish(trainer, folder=tmp_path / "out", format=format)
    data.to_json(tmp_path / "rows.jsonl")
    words = ("--data", tmp_path / "rows.jsonl", "--batch_size", 8)
    status, found = verify(capsys, folder, *words)
    assert [claim for claim, verdict in found.items() if verdict == "NO"] == []
    assert (status, found["compressed: loss"]) == (0, "yes")
    assert ("compressed: perplexity" in found) == (made in (pruned_blocks, packed_experts))


def test_a_language_model_is_evaluated_as_the_trainer_did(tmp_path, capsys):
    data = language_rows(20, seed=1)
    trainer = Trainer(
        tiny_llama(tie_word_embeddings=True),
        settings(tmp_path / "run", steps=2),
        train_dataset=language_rows(),
        eval_dataset=data,
        callbacks=[PruningCallback(0.5, end=1)],
    )
    trainer.train()
    folder = publish(trainer, folder=tmp_path / "out")
    data.to_json(tmp_path / "rows.jsonl")
    words = (folder, "--data", tmp_path / "rows.jsonl", "--batch_size", 8)
    status, found = verify(capsys, *words)
    assert (status, found["compressed: perplexity"], found["compressed: loss"]) == (0, "yes", "yes")


def test_a_card_of_somebody_else_is_checked_by_its_index(rows, tmp_path, capsys):
    model = tiny_bert()
    model.save_pretrained(tmp_path / "theirs")
    tokenizer().save_pretrained(tmp_path / "theirs")
    data = classification_rows(40, seed=1).with_format("torch")
    with torch.no_grad():
        chosen = model.eval()(data["input_ids"][:], data["attention_mask"][:]).logits.argmax(-1)
    percent = 100 * accuracy(chosen, data["labels"][:])
    for value, verdict in ((round(percent, 1), "yes"), (round(percent + 2.5, 1), "NO")):
        results = [
            EvalResult("text-classification", "counting", "counting", metric, stated)
            for metric, stated in (("accuracy", value), ("bleu", 3.0))
        ]
        card = ModelCardData(model_name="theirs", eval_results=results)
        ModelCard(f"---\n{card.to_yaml()}\n---\n# theirs\n").save(tmp_path / "theirs" / "README.md")
        status, found = verify(capsys, tmp_path / "theirs", "--data", rows)
        assert (status, found["model-index: accuracy"]) == (int(verdict == "NO"), verdict)
        assert found["model-index: bleu"] == "-"
    assert "parameters" in found


def test_a_latency_is_true_within_half_as_much_again():
    assert within("ms", 10.0, 14.0).ok
    assert within("ms", 10.0, 7.0).ok
    assert not within("ms", 10.0, 16.0).ok
    assert not within("ms", 16.0, 10.0).ok


def test_a_latency_is_measured_where_it_is_asked(tmp_path, capsys):
    inputs = {"input_ids": torch.arange(5, 17)[None], "attention_mask": torch.ones(1, 12).long()}
    folder = publish(tiny_bert(), folder=tmp_path / "out", inputs=inputs)

    def thousandfold(report):
        report["compressed"]["latency"]["median_ms"] /= 1000

    lie = told_otherwise(folder, tmp_path / "lie", thousandfold)
    for words, status, verdict in (((lie, "--latency"), 1, "NO"), ((lie,), 0, "-")):
        code, found = verify(capsys, *words)
        assert (code, found["latency, median, ms"]) == (status, verdict)


@pytest.mark.slow
def test_peak_memory_is_measured_where_it_is_asked(tmp_path, capsys):
    inputs = {"input_ids": torch.arange(5, 17)[None]}
    folder = publish(tiny_bert(), folder=tmp_path / "out", inputs=inputs, memory=True)

    def thousandfold(report):
        report["compressed"]["peak_memory_bytes"] *= 1000

    status, found = verify(capsys, folder, "--memory")
    assert (status, found["peak memory, bytes"]) == (0, "yes")
    lie = told_otherwise(folder, tmp_path / "lie", thousandfold)
    status, found = verify(capsys, lie, "--memory")
    assert (status, found["peak memory, bytes"]) == (1, "NO")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere/at/all"], "'nowhere/at/all' is neither a folder nor the `org/name`"),
        (["{published}", "--data", "{rows}", "--split", "dev"], "no split 'dev': ['train']"),
    ],
)
def test_what_cannot_be_checked_is_refused(words, message, published, rows):
    words = [word.format(published=published, rows=rows) for word in words]
    with pytest.raises(ValueError, match=re.escape(message)):
        main(words)


@pytest.mark.parametrize(
    "start",
    [["-m", "hf_compress.verify"], pytest.param(["scripts/verify.py"], marks=pytest.mark.slow)],
    ids=["module", "script"],
)
def test_it_is_a_command(start, published, tmp_path):
    lie = told_otherwise(published, tmp_path / "lie", change("compressed", "bytes", by=1))
    run = subprocess.run(
        [sys.executable, *start, str(lie)], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert run.returncode == 1, run.stderr[-2000:]
    assert "claims hold, 1 do not" in run.stdout
