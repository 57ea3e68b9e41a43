import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from huggingface_hub import ModelCard
from tiny import classification_rows, language_rows, tiny_bert, tiny_llama
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

from hf_compress import DistillationArguments, DistillationTrainer, PruningCallback, publish
from hf_compress.measure import count_weights
from hf_compress.metrics.functions import accuracy
from hf_compress.publishing.audit import audit
from hf_compress.publishing.validate import validate

IDS = torch.arange(5, 17)[None]
WRITTEN = {"README.md", "report.json", "config.json", "model.safetensors"}


def settings(path, kind=TrainingArguments, steps=16, **arguments):
    return kind(
        path,
        max_steps=steps,
        logging_steps=2,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **arguments,
    )


def score(prediction):
    return {"accuracy": accuracy(prediction.predictions.argmax(-1), prediction.label_ids)}


def tokenizer():
    words = {f"w{i}": i for i in range(90)} | {"[UNK]": 90, "[PAD]": 91}
    inner = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", pad_token="[PAD]")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A pruned student with its teacher, trained once; the tests only read it."""
    torch.manual_seed(0)
    trainer = DistillationTrainer(
        tiny_bert(),
        settings(tmp_path_factory.mktemp("run"), DistillationArguments),
        teacher=tiny_bert(hidden=64, seed=1),
        train_dataset=classification_rows(),
        eval_dataset=classification_rows(40, seed=1),
        compute_metrics=score,
        processing_class=tokenizer(),
        callbacks=[PruningCallback(0.8, interval=2)],
    )
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def published(trained, tmp_path_factory):
    return publish(
        trained,
        "me/tiny-sparse80",
        folder=tmp_path_factory.mktemp("hub") / "tiny",
        dataset="counting",
        split="test",
        base_model="org/base",
        license="apache-2.0",
    )


def read(folder):
    return json.loads((folder / "report.json").read_text())


def test_one_folder_holds_all_and_nothing_more(published):
    names = {file.name for file in published.iterdir()}
    pictures = {"sparsity.png", "layers.png"}
    assert names == WRITTEN | pictures | {"tokenizer.json", "tokenizer_config.json"}
    assert [file.name for file in published.parent.iterdir()] == [published.name]
    for name in pictures:
        assert (published / name).read_bytes().startswith(b"\x89PNG")
    assert "/tmp" not in (published / "report.json").read_text()


def test_the_numbers_are_those_of_the_files_and_the_models(trained, published):
    report, found = read(published), audit(published)
    weights, dense = count_weights(trained.model), count_weights(trained.teacher)
    compressed = report["compressed"]
    assert (compressed["parameters"], compressed["nonzeros"]) == (weights.parameters, weights.nonzeros)
    assert report["dense"]["parameters"] == dense.parameters
    assert compressed["bytes"] == (published / "model.safetensors").stat().st_size
    assert report["audit"]["target_sparsity"] == found.sparsity_of(report["audit"]["targets"])
    assert report["audit"]["target_sparsity"] == pytest.approx(0.8, abs=1e-4)
    assert compressed["peak_memory_bytes"] is None
    inputs = {"input_ids": [8, 12], "attention_mask": [8, 12]}
    assert compressed["latency"]["inputs"] == report["dense"]["latency"]["inputs"] == inputs


def test_both_models_are_scored_on_the_same_rows(trained, published):
    report = read(published)
    rows = trained.eval_dataset.with_format("torch")
    for side, model in (("compressed", trained.model), ("dense", trained.teacher)):
        with torch.no_grad():
            logits = model.eval()(rows["input_ids"][:], rows["attention_mask"][:]).logits
        loss = torch.nn.functional.cross_entropy(logits, rows["labels"][:])
        scores = report[side]["metrics"]
        assert scores["accuracy"] == accuracy(logits.argmax(-1), rows["labels"][:])
        assert scores["loss_task"] == pytest.approx(loss.item(), rel=1e-4)
        # Of the mixed loss, whose parts mean another thing for the teacher itself, there is none.
        assert not {"loss", "loss_kd"} & scores.keys()
    ratio = report["compressed"]["metrics"]["accuracy"] / report["dense"]["metrics"]["accuracy"]
    assert report["recovery"]["accuracy"] == pytest.approx(100 * ratio)
    assert report["dataset"] == {"name": "counting", "split": "test", "rows": 40}
    assert trained.model is not trained.teacher


def test_the_recipe_is_told_by_those_who_cooked(published):
    recipe = read(published)["recipe"]
    (pruning,) = recipe["methods"]
    assert (pruning["sparsity"], pruning["score"], pruning["schedule"]) == (0.8, "obd", "cubic")
    assert recipe["distillation"]["temperature"] == 2.0
    assert recipe["training"]["steps_done"] == 16
    assert recipe["training"]["seed"] == 42
    history = read(published)["history"]
    assert [row["sparsity"] for row in history if "loss" in row][-1] == pytest.approx(0.8, abs=1e-4)


def test_the_card_says_what_a_reader_asks(published):
    card = ModelCard.load(published / "README.md")
    data = card.data.to_dict()
    assert data["base_model"] == "org/base"
    assert data["base_model_relation"] == "finetune"
    assert data["pipeline_tag"] == "text-classification"
    assert {"pruned", "knowledge-distillation"} <= set(data["tags"])
    (result,) = card.data.eval_results
    assert (result.metric_type, result.dataset_type) == ("accuracy", "counting")
    report = read(published)
    assert result.metric_value == report["compressed"]["metrics"]["accuracy"]
    first = card.content.split("# me/tiny-sparse80")[1].strip().splitlines()[0]
    for side in ("compressed", "dense"):
        assert f"{report[side]['metrics']['accuracy']:.4f}" in first
    assert "save no bytes and no time" in card.content
    assert "| peak memory, bytes | not measured | not measured |" in card.content
    assert "https://huggingface.co/papers/1503.02531" in card.content


def test_the_snippet_of_the_card_runs_without_this_package(trained, published):
    text = (published / "README.md").read_text()
    snippet = text.split("```python\n")[1].split("```")[0]
    assert snippet.count('"me/tiny-sparse80"') == 2
    script = "import sys\nsys.modules['hf_compress'] = None\n" + snippet.replace(
        "me/tiny-sparse80", str(published)
    )
    script += f"print(model(input_ids=__import__('torch').tensor({IDS.tolist()})).logits.tolist())"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    logits = torch.tensor(json.loads(run.stdout.splitlines()[-1]))
    with torch.no_grad():
        torch.testing.assert_close(logits, trained.model.eval()(input_ids=IDS).logits)


def test_a_second_result_takes_the_place_of_the_first(trained, tmp_path):
    (tmp_path / "out").mkdir()
    for name in ("me/first", "me/second"):
        publish(trained, name, folder=tmp_path / "out")
        (tmp_path / "out" / "stray").touch()
    (tmp_path / "out" / "stray").unlink()
    assert read(tmp_path / "out")["name"] == "me/second"
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_a_language_model_gets_a_perplexity_and_a_given_baseline_is_measured(tmp_path):
    model = tiny_llama()
    trainer = Trainer(
        model,
        settings(tmp_path / "run", steps=4),
        train_dataset=language_rows(),
        eval_dataset=language_rows(16, seed=1),
        callbacks=[PruningCallback(0.5, end=2)],
    )
    dense = copy.deepcopy(model)
    trainer.train()
    report = read(publish(trainer, folder=tmp_path / "out", baseline=dense))
    scores = report["compressed"]["metrics"]
    assert scores["perplexity"] == pytest.approx(torch.tensor(scores["loss"]).exp().item(), rel=1e-5)
    assert report["metric"] == "perplexity"
    assert report["recovery"]["perplexity"] == pytest.approx(
        100 * report["dense"]["metrics"]["perplexity"] / scores["perplexity"]
    )
    assert report["dense"]["nonzeros"] > report["compressed"]["nonzeros"]
    assert "None was stated" in (tmp_path / "out" / "README.md").read_text()


def test_of_a_bare_model_nothing_is_claimed_that_was_not_measured(tmp_path):
    folder = publish(tiny_bert(), folder=tmp_path / "out")
    report = read(folder)
    assert report["dense"] is None
    assert report["compressed"]["metrics"] == {}
    text = (folder / "README.md").read_text()
    assert "Its quality was not measured." in text
    assert "model-index" not in text
    assert "| latency, median, ms | not measured | not measured |" in text
    assert {file.name for file in folder.iterdir()} == WRITTEN


@pytest.mark.parametrize("bits", [8, 4])
def test_a_packed_model_counts_its_weights_and_names_what_it_needs(bits, tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForSequenceClassification

    from hf_compress.quantization.bnb import load_quantized

    dense = tiny_bert(hidden=64)
    dense.save_pretrained(tmp_path / "dense")
    packed = load_quantized(tmp_path / "dense", bits, AutoModelForSequenceClassification)

    def evaluate(model):
        with torch.no_grad():
            return {"mean_logit": model(input_ids=IDS).logits.abs().mean().item()}

    folder = publish(
        packed,
        folder=tmp_path / "out",
        baseline=dense,
        evaluate=evaluate,
        inputs={"input_ids": IDS},
        base_model="org/base",
    )
    report = read(folder)
    assert report["compressed"]["parameters"] == report["dense"]["parameters"]
    assert report["compressed"]["bytes"] < report["dense"]["bytes"]
    assert report["compressed"]["metrics"] == evaluate(packed)
    data = ModelCard.load(folder / "README.md").data.to_dict()
    assert data["base_model_relation"] == "quantized"
    assert f"{bits}-bit" in data["tags"]
    assert "pip install bitsandbytes" in (folder / "README.md").read_text()


def test_a_base_on_this_machine_is_named_without_its_folder(tmp_path):
    tiny_bert().save_pretrained(tmp_path / "my-base")
    model = type(tiny_bert()).from_pretrained(tmp_path / "my-base")
    folder = publish(model, folder=tmp_path / "out")
    data = ModelCard.load(folder / "README.md").data.to_dict()
    assert "base_model" not in data
    assert "base_model_relation" not in data
    assert "compressed from my-base." in (folder / "README.md").read_text()
    for file in ("README.md", "report.json", "config.json"):
        assert str(tmp_path) not in (folder / file).read_text()


def test_files_that_are_denser_than_asked_are_refused(trained, tmp_path):
    name = read_targets(trained)[0]
    weight = trained.model.get_parameter(name)
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.copy_(torch.where(weight == 0, 1e-3, weight))
        with pytest.raises(ValueError, match="denser than asked"):
            publish(trained, folder=tmp_path / "out")
    finally:
        with torch.no_grad():
            weight.copy_(kept)
    assert list(tmp_path.iterdir()) == []


def read_targets(trainer):
    (pruning,) = [c for c in trainer.callback_handler.callbacks if isinstance(c, PruningCallback)]
    return list(pruning.describe()["weights"])


def test_a_card_that_is_not_fit_is_not_published(tmp_path):
    with pytest.raises(ValueError, match="'/data/mine/rows' is a path of this machine"):
        publish(tiny_bert(), folder=tmp_path / "out", dataset="/data/mine/rows")
    assert list(tmp_path.iterdir()) == []


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


def never(model):
    raise AssertionError("work began before the refusal")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"push": True}, NotImplementedError, "not there yet"),
        ({"repo_id": "no-owner"}, ValueError, "org/name"),
        ({"repo_id": "/tmp/model/x"}, ValueError, "org/name"),
        ({"license": "my-own"}, ValueError, "no identifier of the Hub"),
        ({"license": "other"}, ValueError, "license_name"),
        ({"license_name": "Mine"}, ValueError, "license='other'"),
        ({"baseline": torch.nn.Linear(1, 1)}, TypeError, "`baseline` must be a Transformers model"),
        ({"source": torch.nn.Linear(1, 1)}, TypeError, "`source` must be a Transformers model"),
    ],
)
def test_wrong_arguments_are_refused_before_any_work(arguments, error, message, tmp_path):
    arguments = {"source": tiny_bert(), "folder": tmp_path / "out", "evaluate": never} | arguments
    with pytest.raises(error, match=message):
        publish(arguments.pop("source"), arguments.pop("repo_id", None), **arguments)
    assert list(tmp_path.iterdir()) == []


def test_folders_that_cannot_take_it_are_refused_before_any_work(tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "report.json").write_text('{"of": "someone else"}')
    (tmp_path / "file").touch()
    for name, error in (("theirs", FileExistsError), ("file", FileExistsError), ("file/out", OSError)):
        with pytest.raises(error, match=r"another `folder`|cannot be written"):
            publish(tiny_bert(), folder=tmp_path / name, evaluate=never)
    assert {file.name for file in tmp_path.iterdir()} == {"theirs", "file"}


def test_the_compressed_model_is_no_baseline_and_unknown_metrics_are_named(tmp_path):
    model = tiny_bert()
    with pytest.raises(ValueError, match="the compressed model itself"):
        publish(model, folder=tmp_path / "out", baseline=model)
    with pytest.raises(ValueError, match=r"'f1' is none of \['accuracy'\]"):
        publish(model, folder=tmp_path / "out", evaluate=lambda _: {"accuracy": 1.0}, metric="f1")


def test_peak_memory_is_measured_on_demand(tmp_path):
    folder = publish(tiny_bert(), folder=tmp_path / "out", inputs={"input_ids": IDS}, memory=True)
    peak = read(folder)["compressed"]["peak_memory_bytes"]
    assert peak > 0
    assert f"| peak memory, bytes | not measured | {peak:,} |" in (folder / "README.md").read_text()


BREAKS = {
    "a score": ("| accuracy | ", "| accuracy | 9", r"accuracy is '90?\.\d+', the report has"),
    "a size": ("| parameters | ", "| parameters | 1", "parameters is"),
    "a row": ("| bytes on disk |", "| bytes |", "the row 'bytes on disk' is missing"),
    "a relation": ("relation: finetune", "relation: shrunk", "'shrunk' is none of finetune"),
    "a licence": ("license: apache-2.0", "license: mine", "license: `license` 'mine'"),
    "a base": ("base_model: org/base", "base_model: ./base/x", "no 'org/name'"),
    "the index": ("      value: 0.", "      value: 7.", "model-index: accuracy is 7"),
    "a mark": ("## Limits", "## Limits {{ x }}", "'{{' was left over"),
    "a path": ("## Limits", "see /home/me/x", "'/home/me/x' is a path of this machine"),
    "a link": ("(layers.png)", "(lost.png)", "'lost.png' is neither"),
    "the yaml": ("library_name: transformers", "library_name: [", "front matter: cannot be read"),
}


@pytest.mark.parametrize("what", BREAKS)
def test_a_card_that_says_something_else_is_refused(what, published, tmp_path):
    before, after, message = BREAKS[what]
    for file in published.iterdir():
        if file.suffix in (".md", ".json", ".png"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    validate(tmp_path)
    card = tmp_path / "README.md"
    text = card.read_text()
    assert before in text
    card.write_text(text.replace(before, after, 1))
    with pytest.raises(ValueError, match=message):
        validate(tmp_path)


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


def test_an_eval_dataset_in_parts_is_measured_in_parts(tmp_path):
    parts = {"a": classification_rows(8), "b": classification_rows(12, seed=3)}
    trainer = Trainer(
        tiny_bert(),
        settings(tmp_path / "run", steps=1),
        train_dataset=classification_rows(8),
        eval_dataset=parts,
        compute_metrics=score,
    )
    trainer.train()
    report = read(publish(trainer, folder=tmp_path / "out", baseline=tiny_bert(seed=2)))
    assert {"a_accuracy", "b_accuracy", "a_loss", "b_loss"} == report["compressed"]["metrics"].keys()
    assert report["dense"]["metrics"].keys() == report["compressed"]["metrics"].keys()
    assert report["dataset"]["rows"] == 20
