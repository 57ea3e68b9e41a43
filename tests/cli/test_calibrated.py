"""What `oneshot` and `structure` share: rows and model, and that their results load without them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertModel

from hf_compress.cli import oneshot, structure
from hf_compress.cli.arguments import CalibrationArguments
from hf_compress.cli.calibrated import check, loaded
from hf_compress.samples import corpus

_STRANGER = """
import json, sys

class Without:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hf_compress":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Without())
import torch
import transformers

found = {}
for kind, folder in json.loads(sys.argv[1]):
    model, info = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    batch = transformers.AutoTokenizer.from_pretrained(folder)("profits rose", return_tensors="pt")
    logits = model.eval()(**batch).logits
    assert logits.isfinite().all()
    zeros = {name: [int((p == 0).sum()), p.numel()] for name, p in model.named_parameters()}
    found[folder] = {"zeros": zeros, "config": model.config.to_dict()}
print(json.dumps(found))
"""

CLASSIFIER, SPEAKER = "AutoModelForSequenceClassification", "AutoModelForCausalLM"


def test_plain_transformers_finds_what_was_asked(classifier, language_model, texts, tmp_path, capsys):
    bert = ["--model", classifier, "--dataset", "reuters-r8", "--max_length", "16"]
    llama = ["--model", language_model, "--dataset", texts, "--max_length", "16", "--task", "causal-lm"]
    runs = {
        "2:4": (CLASSIFIER, oneshot, [*bert, "--pattern", "2:4"]),
        "disk": (SPEAKER, oneshot, [*llama, "--device_map", "disk", "--sparsity", "0.75"]),
        "fewer layers": (CLASSIFIER, structure, [*bert, "--ffn", "0.5", "--layers", "3"]),
        "fewer heads": (SPEAKER, structure, [*llama, "--heads", "0.5", "--score", "activation"]),
    }
    for name, (_, command, words) in runs.items():
        command.main([*words, "--rows", "24", "--output_dir", str(tmp_path / name)])
    places = json.dumps([(kind, str(tmp_path / name)) for name, (kind, _, _) in runs.items()])
    run = subprocess.run(
        [sys.executable, "-I", "-c", _STRANGER, places], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found = {Path(folder).name: model for folder, model in json.loads(run.stdout).items()}

    for name, sparsity, count in (("2:4", 0.5, 25), ("disk", 0.75, 14)):
        told = json.loads((tmp_path / name / "oneshot.json").read_text())
        sparsities = {target: found[name]["zeros"][target] for target in told["pruned"]}
        assert len(sparsities) == count
        assert all(zeros == sparsity * size for zeros, size in sparsities.values())

    sizes = ("num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_size")
    assert [found["fewer layers"]["config"][size] for size in sizes] == [3, 4, 32, 32]
    assert [found["fewer heads"]["config"][size] for size in sizes] == [2, 2, 64, 32]
    printed = capsys.readouterr().out
    for name in ("fewer layers", "fewer heads"):
        told = json.loads((tmp_path / name / "structure.json").read_text())
        total = sum(size for _, size in found[name]["zeros"].values())
        assert told["found"]["parameters"] == total < told["parameters_before"]
        assert f"{total:,} of {told['parameters_before']:,}" in printed


def arguments(model, folder, **changes):
    settings = {"dataset": "reuters-r8", "rows": 24, "max_length": 16, "output_dir": str(folder)}
    return CalibrationArguments(model=str(model), **{**settings, **changes})


def test_texts_become_full_rows(language_model, texts, tmp_path):
    changes = {"dataset": texts, "task": "causal-lm", "rows": 5, "max_length": 7, "batch_size": 2}
    with loaded(arguments(language_model, tmp_path, **changes), "labels") as (_, _, batches):
        assert [tuple(batch["input_ids"].shape) for batch in batches] == [(2, 7), (2, 7), (1, 7)]
        assert all(torch.equal(batch["input_ids"], batch["labels"]) for batch in batches)
        ids = torch.cat([batch["input_ids"] for batch in batches]).flatten().tolist()
    tokenizer = AutoTokenizer.from_pretrained(language_model)
    rows = load_dataset("json", data_files=texts)["train"].shuffle(seed=0)
    assert ids == [i for text in rows["text"] for i in tokenizer(text).input_ids][:35]


def test_labels_are_the_classes_of_the_model(classifier, tmp_path):
    """Its order of the classes may be another than that of the data."""
    model = AutoModelForSequenceClassification.from_pretrained(classifier)
    names = corpus("reuters-r8")["train"].features["label"].names
    model.config.id2label = dict(enumerate(reversed(names)))
    model.config.label2id = {name: i for i, name in model.config.id2label.items()}
    with loaded(arguments(classifier, tmp_path), "labels") as (_, tokenizer, given):
        model.save_pretrained(tmp_path / "reversed")
        tokenizer.save_pretrained(tmp_path / "reversed")
    with loaded(arguments(tmp_path / "reversed", tmp_path), "labels") as (_, _, turned):
        for one, two in zip(given, turned, strict=True):
            assert torch.equal(one["labels"], 7 - two["labels"])


def test_texts_need_no_labels(classifier, texts, tmp_path):
    with loaded(arguments(classifier, tmp_path, dataset=texts), "texts") as (_, _, batches):
        assert sum(len(batch["input_ids"]) for batch in batches) == 24
        assert all("labels" not in batch for batch in batches)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": 0}, "`rows` is 0: pass 1 or more"),
        ({"batch_size": 0}, "`batch_size` is 0"),
        ({"max_length": -1}, "`max_length` is -1"),
        ({"dataset": None}, "pass `dataset`: this `score` needs rows"),
    ],
)
def test_settings_are_checked_first(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        check(arguments("no/model", tmp_path, **changes), "texts")


def test_the_given_model_is_not_overwritten(classifier, tmp_path):
    same = Path(classifier) / ".." / Path(classifier).name
    with pytest.raises(ValueError, match="is the folder of the given model"):
        check(arguments(classifier, same), "texts")


def test_one_process(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="launch only one"):
        check(arguments("no/model", tmp_path), "texts")


def refused(message, *given, **changes):
    with pytest.raises(ValueError, match=message), loaded(arguments(*given, **changes), "labels"):
        pass


def test_data_that_does_not_fit_is_refused(classifier, language_model, tmp_path):
    refused("for at most 512 tokens", classifier, tmp_path, max_length=513)
    refused("no split 'all'", classifier, tmp_path, train_split="all")
    refused("no column 'words'", classifier, tmp_path, text_column="words")
    refused("no column 'topic'", classifier, tmp_path, label_column="topic")
    refused("pass what the model was trained for", classifier, tmp_path, dataset="reuters-r52")
    short = tmp_path / "short.csv"
    short.write_text("text\nA few words.\n")
    changes = {"task": "causal-lm", "dataset": str(short)}
    refused("has 6 tokens, less than one row", language_model, tmp_path, **changes)


def test_a_model_without_a_head_is_refused(classifier, tmp_path):
    BertModel.from_pretrained(classifier).save_pretrained(tmp_path / "bare")
    AutoTokenizer.from_pretrained(classifier).save_pretrained(tmp_path / "bare")
    refused(r"lacks \['classifier.bias', 'classifier.weight'\]", tmp_path / "bare", tmp_path)
