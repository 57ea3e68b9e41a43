"""`report.json`: its numbers are those of the written files and of the models."""

import copy
import math

import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from packaging.version import Version
from publishing.runs import IDS, WRITTEN, read, score, settings
from tiny import classification_rows, language_rows, tiny_bert, tiny_gpt2, tiny_llama, tiny_mixtral
from transformers import (
    AutoModelForSequenceClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    Trainer,
)

from hf_compress import (
    DistillationArguments,
    DistillationTrainer,
    PruningCallback,
    precompute_teacher,
    publish,
)
from hf_compress.measure import count_weights
from hf_compress.metrics.functions import accuracy
from hf_compress.publishing.audit import audit
from hf_compress.publishing.naming import written_as


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
    assert report["dataset"] == {"name": "counting", "revision": None, "split": "test", "rows": 40}
    assert report["structure"]["hidden_size"] == {"dense": 64, "compressed": 32}
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


def test_a_teacher_that_was_asked_before_is_told_and_its_mixed_loss_is_not(tmp_path):
    teacher = tiny_bert(seed=1)
    rows = precompute_teacher(classification_rows(), teacher, folder=tmp_path / "asked")
    trainer = DistillationTrainer(
        tiny_bert(),
        settings(tmp_path / "run", DistillationArguments, steps=4, use_cpu=True),
        teacher="cached",
        train_dataset=rows,
        eval_dataset=rows,
    )
    trainer.train()
    report = read(publish(trainer, folder=tmp_path / "out", baseline=teacher))
    told = report["recipe"]["distillation"]
    assert told["teacher's answers"] == "kept before (logits)"
    assert told["teacher's precision"] == "float32"
    for side in ("compressed", "dense"):
        assert "loss_task" in report[side]["metrics"]
        assert not {"loss", "loss_kd"} & report[side]["metrics"].keys()
    assert "knowledge-distillation" in ModelCard.load(tmp_path / "out" / "README.md").data.tags


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


def test_the_loss_of_a_language_model_is_that_of_its_predicted_tokens(tmp_path):
    """Trainer divides that of GPT-2 by all tokens, the first ones too, which nothing predicts."""
    model, rows = tiny_gpt2(), language_rows(8)
    run = settings(tmp_path / "run", steps=1)
    trainer = Trainer(model, run, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    found = read(publish(trainer, folder=tmp_path / "out"))["compressed"]["metrics"]
    data = rows.with_format("torch")
    with torch.no_grad():
        logits = model.eval()(data["input_ids"][:], attention_mask=data["attention_mask"][:]).logits
    wanted = data["labels"][:][:, 1:].flatten()
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), wanted).item()
    assert found["loss"] == pytest.approx(loss, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert trainer.evaluate()["eval_loss"] < 0.95 * loss


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


def test_peak_memory_is_measured_on_demand(tmp_path):
    folder = publish(tiny_bert(), folder=tmp_path / "out", inputs={"input_ids": IDS}, memory=True)
    peak = read(folder)["compressed"]["peak_memory_bytes"]
    assert peak > 0
    assert f"| peak memory, bytes | not measured | {peak:,} |" in (folder / "README.md").read_text()


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


def test_weights_are_found_under_the_names_that_the_files_have(tmp_path):
    trainer = Trainer(
        tiny_mixtral(),
        settings(tmp_path / "run", steps=3),
        train_dataset=language_rows(8),
        callbacks=[PruningCallback({"experts": 0.75, "self_attn": 0.5}, end=2)],
    )
    trainer.train()
    report = read(publish(trainer, folder=tmp_path / "out"))
    model, found = trainer.model, audit(tmp_path / "out")
    layers, experts = 2, 4
    stored = [name for name in report["audit"]["targets"] if "experts" in name]
    assert len(stored) == 3 * experts * layers
    assert found.sparsity_of(stored) == 0.75
    zeros = sum(int((p == 0).sum()) for n, p in model.named_parameters() if "experts" in n)
    assert sum(found.tensors[name].zeros for name in stored) == zeros
    # One of them denser: the files are no longer what the callback left.
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[3].fill_(1.0)
    with pytest.raises(ValueError, match="denser than asked"):
        publish(trainer, folder=tmp_path / "out")


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"), reason="5.17 computes a Dinov2 as it is stored"
)
def test_weights_that_share_a_tensor_of_the_files_are_refused():
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, image_size=28, use_swiglu_ffn=True
    )
    model = Dinov2ForImageClassification(config)
    layer = "dinov2.encoder.layer.0"
    (query,) = written_as(model, [f"{layer}.attention.q_proj.weight"]).values()
    assert query == [f"{layer}.attention.attention.query.weight"]
    halves = [f"{layer}.mlp.gate_proj.weight", f"{layer}.mlp.up_proj.weight"]
    with pytest.raises(
        ValueError, match="stores .*gate_proj.weight and .*up_proj.weight as one tensor"
    ):
        written_as(model, halves)
