import logging
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from short import arguments
from tiny import classification_rows, language_rows, tiny_bert, tiny_llama
from transformers import (
    AutoModelForSequenceClassification,
    EarlyStoppingCallback,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
)
from trl import SFTConfig, SFTTrainer

from hf_compress import PruningCallback
from hf_compress.callbacks.base import CompressionCallback
from hf_compress.targets import find_targets

STEPS = 20
RUN = {"max_steps": STEPS, "learning_rate": 1e-2}


def trainer(folder, callback, model=None, callbacks=(), **settings):
    return Trainer(
        model or tiny_bert(),
        arguments(folder, **(RUN | settings)),
        train_dataset=classification_rows(),
        eval_dataset=classification_rows(seed=1),
        callbacks=[*([callback] if callback else []), *callbacks],
    )


def zeros(model):
    parameters = find_targets(model).parameters
    return sum(int((p == 0).sum()) for p in parameters.values())


def size(model):
    return sum(p.numel() for p in find_targets(model).parameters.values())


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one, other):
    return all(value.equal(other[name]) for name, value in one.items())


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("score", ["obd", "taylor", "magnitude"])
def test_hits_its_target_exactly_and_keeps_the_rest_dense(tmp_path, score, scope):
    callback = PruningCallback(0.73, score=score, scope=scope, interval=3)
    run = trainer(tmp_path, callback)
    run.train()
    selection = find_targets(run.model)
    if scope == "global":
        assert zeros(run.model) == round(0.73 * size(run.model))
    else:
        for param in selection.parameters.values():
            assert int((param == 0).sum()) == round(0.73 * param.numel())
    assert (run.model.classifier.weight != 0).all()
    logged = [row["sparsity"] for row in run.state.log_history if "sparsity" in row]
    assert logged == sorted(logged)
    assert logged[-1] == pytest.approx(0.73, abs=1e-3)


def test_it_learns_while_it_prunes(tmp_path):
    run = trainer(tmp_path, PruningCallback(0.5, interval=3), max_steps=80)
    run.train()
    losses = [row["loss"] for row in run.state.log_history if "loss" in row]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_every_checkpoint_is_as_sparse_as_the_log_says(tmp_path):
    callback = PruningCallback(0.6, interval=2)
    run = trainer(tmp_path, callback, save_strategy="steps", save_steps=5)
    run.train()
    logged = {r["step"]: r["sparsity"] for r in run.state.log_history if "loss" in r}
    total = size(run.model)
    for step in (5, 10, 15, 20):
        tensors = load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors")
        assert set(tensors) == set(tiny_bert().state_dict())
        found = sum(int((tensors[n] == 0).sum()) for n in find_targets(run.model).targets)
        assert found == pytest.approx(logged[step] * total)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "checkpoint-20")
    assert same(state(plain), state(run.model))


@pytest.mark.parametrize(
    "optim", ["adamw_torch", "adamw_torch_fused", "adamw_bnb_8bit", "adafactor", "sgd"]
)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_resume_is_bit_equal(tmp_path, optim, accumulation):
    settings = {
        "optim": optim,
        "gradient_accumulation_steps": accumulation,
        "per_device_train_batch_size": 8 // accumulation,
        "save_strategy": "steps",
        "save_steps": 9,
    }
    whole = trainer(tmp_path / "run", PruningCallback(0.7, interval=4), **settings)
    whole.train()
    rest = trainer(tmp_path / "run", PruningCallback(0.7, interval=4), **settings)
    rest.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-9"))
    assert same(state(whole.model), state(rest.model))
    assert zeros(rest.model) == round(0.7 * size(rest.model))


def test_the_cut_of_the_batch_does_not_change_the_masks(tmp_path):
    masks = []
    for batch, accumulation in ((8, 1), (2, 4)):
        run = trainer(
            tmp_path,
            PruningCallback(0.5, score="magnitude", interval=4),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            max_steps=12,
            learning_rate=1e-5,
        )
        run.train()
        masks.append({n: p == 0 for n, p in find_targets(run.model).parameters.items()})
    assert same(*masks)


class Steady(CompressionCallback):
    """A compression callback that has nothing to do."""

    finished = True

    def measurements(self):
        return {}

    def describe(self):
        return {}


def test_the_best_checkpoint_is_never_denser_than_asked(tmp_path):
    run = trainer(
        tmp_path,
        PruningCallback(0.8, interval=2, end=0.5),
        callbacks=[EarlyStoppingCallback(2)],
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=2,
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,
        learning_rate=0.05,
    )
    run.train()
    assert run.state.best_global_step >= 10
    assert zeros(run.model) == round(0.8 * size(run.model))


def test_ending_before_the_schedule_is_told(tmp_path, caplog):
    class Stop(EarlyStoppingCallback):
        def on_train_begin(self, *args, **kwargs):
            pass

        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 5

    from transformers.utils import logging as transformers_logging

    transformers_logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        trainer(tmp_path, PruningCallback(0.8), callbacks=[Stop(1)]).train()
    assert "not 0.8000 as asked: training ended at step 5 of 20" in caplog.text


def test_a_model_that_is_sparser_already_is_told(tmp_path, caplog):
    from transformers.utils import logging as transformers_logging

    transformers_logging.enable_propagation()
    sparse = trainer(tmp_path, PruningCallback(0.8))
    sparse.train()
    assert "already" not in caplog.text
    trainer(tmp_path, PruningCallback(0.5), model=sparse.model).train()
    assert "the weights are 0.8000 sparse already, more than the 0.5000 asked" in caplog.text


def test_a_second_training_starts_anew_and_keeps_its_zeros(tmp_path):
    callback = PruningCallback(0.5, interval=2)
    run = trainer(tmp_path, callback)
    run.train()
    run.train()
    assert zeros(run.model) == round(0.5 * size(run.model))
    assert not any(
        str(key).startswith("hf_compress") for s in run.optimizer.state.values() for key in s
    )


def test_sparsity_of_each_target(tmp_path):
    callback = PruningCallback({"re:attention": 0.3, "Linear": 0.8}, interval=3)
    run = trainer(tmp_path, callback)
    run.train()
    groups = {0.3: [], 0.8: []}
    for name, param in find_targets(run.model).parameters.items():
        groups[0.3 if "attention" in name else 0.8].append(param)
    for sparsity, params in groups.items():
        total = sum(p.numel() for p in params)
        assert sum(int((p == 0).sum()) for p in params) == round(sparsity * total)


def test_logs_reach_the_reporters_once_attached(tmp_path):
    class Reporter(Steady):
        seen: list = []

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.seen.append(dict(logs))

    reporter, callback = Reporter(), PruningCallback(0.5, interval=2)
    run = trainer(tmp_path, None, callbacks=[reporter, callback])
    callback.attach(run)
    run.train()
    assert all("sparsity" in logs for logs in reporter.seen)


def test_seq2seq_trainer(tmp_path):
    run = Seq2SeqTrainer(
        tiny_bert(),
        arguments(tmp_path, Seq2SeqTrainingArguments, **RUN),
        train_dataset=classification_rows(),
        callbacks=[PruningCallback(0.5, interval=2)],
    )
    run.train()
    assert zeros(run.model) == round(0.5 * size(run.model))


def test_supervised_fine_tuning(tmp_path):
    rows = language_rows().remove_columns(["attention_mask", "labels"])
    run = SFTTrainer(
        tiny_llama(),
        SFTConfig(
            str(tmp_path),
            max_steps=STEPS,
            per_device_train_batch_size=8,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            bf16=False,
            activation_checkpointing=False,
            save_strategy="no",
            eos_token="<eos>",
            pad_token="<pad>",
        ),
        train_dataset=rows,
        processing_class=word_tokenizer(),
        callbacks=[PruningCallback(0.5, interval=2)],
    )
    run.train()
    assert zeros(run.model) == round(0.5 * size(run.model))


def word_tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {f"w{i}": i for i in range(3, 96)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")),
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
    )


def test_dry_run_tells_what_will_happen_and_changes_nothing():
    model = tiny_bert()
    before = state(model)
    plan = PruningCallback(0.9).dry_run(model)
    text = str(plan)
    assert "bert.encoder.layer.0.attention.self.query.weight" in text
    assert "1 x output head" in text
    assert "do not run faster" in text
    assert plan.zeros == sum(round(0.9 * p.numel()) for p in find_targets(model).parameters.values())
    assert same(before, state(model))


def test_description_is_json(tmp_path):
    import json

    callback = PruningCallback(0.5, interval=2, schedule=partial(pow, exp=3))
    trainer(tmp_path, callback).train()
    description = json.loads(json.dumps(callback.describe()))
    assert description["schedule"] == "pow(exp=3)"
    assert description["sparsity"] == 0.5
    assert len(description["weights"]) == 13


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": "atention"}, "near names: attention"),
        ({"ignore": "Linear"}, "leave no weight"),
        ({"targets": 3}, "`targets` is a int: pass class names"),
        ({"sparsity": 0.9999, "scope": "layer"}, "leaves nothing of bert.*ask for less"),
        ({"sparsity": 0.99, "scope": "row"}, "where 32 parts compete: ask for less"),
        ({"sparsity": 0.99, "pattern": "row", "scope": "layer"}, "leaves nothing of"),
        ({"end": 21}, "ends at step 21.*ends at step 20"),
        ({"sparsity": {"Linear": 0.5, "query": 0.9}}, "special ones first"),
        ({"sparsity": {"qeury": 0.5}}, "near names: query"),
    ],
)
def test_refused_before_the_first_step(tmp_path, settings, message):
    run = trainer(tmp_path, PruningCallback(**({"sparsity": 0.5} | settings)))
    before = state(run.model)
    with pytest.raises(ValueError, match=message):
        run.train()
    assert same(before, state(run.model))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity": 80}, "pass 0.8"),
        ({"sparsity": {"Linear": 1.5}}, "pass 0.8"),
        ({"sparsity": {}}, "empty dict"),
        ({"sparsity": {"Linear": 0.5}, "targets": "Linear"}, "leave `targets` out"),
        ({"schedule": "fast"}, "allowed are"),
        ({"schedule": None}, "`schedule` is None; allowed are"),
        ({"schedule": 3}, "`schedule` is 3; allowed are"),
        ({"score": ["obd", "taylor"]}, "allowed are"),
        ({"interval": True}, "`interval` is True: pass a number of steps"),
        ({"min_keep": "few"}, r"`min_keep` is 'few': it is a fraction in \[0, 1\]"),
        ({"hold_when": 0.01}, r"`hold_when` is 0.01: pass a drop of a metric, such as Drop\("),
        ({"step_back_when": "accuracy"}, "`step_back_when` is 'accuracy': pass a drop"),
        ({"start": 0.9, "end": 0.1}, "after"),
    ],
)
def test_refused_when_made(settings, message):
    with pytest.raises(ValueError, match=message):
        PruningCallback(**({"sparsity": 0.5} | settings))


def test_an_adapted_model_is_refused(tmp_path):
    model = get_peft_model(tiny_bert(), LoraConfig(target_modules=["query"], task_type="SEQ_CLS"))
    with pytest.raises(ValueError, match="frozen.*adapter"):
        trainer(tmp_path, PruningCallback(0.5), model).train()


def test_two_callbacks_on_the_same_weights_are_refused(tmp_path):
    with pytest.raises(ValueError, match="already has a Pruner"):
        trainer(tmp_path, PruningCallback(0.5), callbacks=[PruningCallback(0.9)]).train()


def test_callbacks_are_imported_under_one_name():
    assert PruningCallback.__module__ == "hf_compress.callbacks.pruning"
    assert torch.is_grad_enabled()
