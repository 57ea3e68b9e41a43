"""The dense model: measured in the same way, also where it is of another architecture."""

import copy

import pytest
import torch
from publishing.runs import read, score, settings
from tiny import VOCABULARY, classification_rows, language_rows, tiny_bert, tiny_gpt2
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    Trainer,
    TrainingArguments,
)

from hf_compress import DistillationArguments, DistillationTrainer, PruningCallback, publish
from hf_compress.metrics.functions import accuracy
from hf_compress.publishing.evaluation import trainer_scores


class Strict(DistilBertForSequenceClassification):
    """As a model of one's own may be: unlike those of transformers it swallows no unknown inputs."""

    def forward(self, input_ids, attention_mask=None, labels=None):
        return super().forward(input_ids, attention_mask=attention_mask, labels=labels)


def dense_model(kind):
    torch.manual_seed(3)
    return kind(
        DistilBertConfig(
            vocab_size=VOCABULARY,
            dim=32,
            n_layers=1,
            n_heads=4,
            hidden_dim=64,
            max_position_embeddings=32,
            dropout=0.0,
            attention_dropout=0.0,
            seq_classif_dropout=0.0,
            num_labels=3,
        )
    )


def rows(count=40, seed=1):
    """With token types, which BERT takes and DistilBERT does not."""
    types = [[0] * 12] * count
    return classification_rows(count, seed=seed).add_column("token_type_ids", types)


def reference(model):
    data = rows().with_format("torch")
    with torch.no_grad():
        logits = model.eval()(data["input_ids"][:], data["attention_mask"][:]).logits
    loss = torch.nn.functional.cross_entropy(logits, data["labels"][:]).item()
    return accuracy(logits.argmax(-1), data["labels"][:]), loss


@pytest.mark.parametrize("kind", [DistilBertForSequenceClassification, Strict])
@pytest.mark.parametrize("distilled", [False, True], ids=["Trainer", "DistillationTrainer"])
def test_a_dense_model_that_takes_fewer_inputs_is_measured_as_if_alone(kind, distilled, tmp_path):
    dense = dense_model(kind)
    trainer_class, name, extra = Trainer, "loss", {}
    if distilled:
        trainer_class, name = DistillationTrainer, "loss_task"
        extra = {"teacher": copy.deepcopy(dense)}
    trainer = trainer_class(
        tiny_bert(),
        settings(tmp_path / "run", DistillationArguments, steps=2),
        train_dataset=rows(16, seed=0),
        eval_dataset=rows(),
        compute_metrics=score,
        callbacks=[PruningCallback(0.5, end=1)],
        **extra,
    )
    trainer.train()
    report = read(publish(trainer, folder=tmp_path / "out", baseline=dense))
    found = report["dense"]["metrics"]
    assert (found["accuracy"], found[name]) == pytest.approx(reference(dense), rel=1e-5)
    found = report["compressed"]["metrics"]
    assert (found["accuracy"], found[name]) == pytest.approx(reference(trainer.model), rel=1e-5)
    assert not dense._forward_pre_hooks


@pytest.mark.parametrize("distilled", [False, True], ids=["Trainer", "DistillationTrainer"])
@pytest.mark.parametrize("make", [tiny_bert, tiny_gpt2], ids=["classifier", "GPT-2"])
def test_it_is_evaluated_in_the_precision_of_the_other(make, distilled, tmp_path):
    """The very same weights get the very same scores, which are not those of float32."""
    given = {"output_dir": str(tmp_path), "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    kind, more = Trainer, {}
    arguments = TrainingArguments
    if distilled:
        kind, arguments, more = DistillationTrainer, DistillationArguments, {"teacher": make()}
    data = rows() if make is tiny_bert else language_rows()
    found = {}
    for bf16 in (True, False):
        model, dense = make(), make()
        dense.load_state_dict(model.state_dict())
        scores = trainer_scores(kind(model, arguments(**given, bf16=bf16), eval_dataset=data, **more))
        own, other = scores(model), scores(dense)
        name = "loss_task" if distilled else "loss"
        assert other[name] == pytest.approx(own[name], rel=1e-6)
        found[bf16] = other[name]
    assert found[True] != pytest.approx(found[False], rel=1e-6)
