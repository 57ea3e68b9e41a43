"""The loss in chunks inside a Trainer: the training of whole logits, or a reason against it."""

import logging

import pytest
import torch
from distillation.heads import batch_of, make_model, make_rows
from distributed.test_two_ranks import launch
from tiny import VOCABULARY, classification_rows, language_rows, tiny_bert, tiny_gpt2, tiny_llama
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaForCausalLM,
)

from hf_compress import DistillationArguments, DistillationTrainer, Match
from hf_compress.distillation import chunking
from hf_compress.distillation.divergences import Divergence
from hf_compress.distillation.objective import Objective
from hf_compress.distillation.tasks.heads import head_of
from hf_compress.distillation.teachers import FrozenTeacher

CHUNK = 5
QUIET = {
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 3,
    "max_steps": 2,
    "logging_steps": 1,
    "learning_rate": 1e-2,
    "save_strategy": "no",
    "use_cpu": True,
    "disable_tqdm": True,
}
SPREAD = {"initializer_range": 0.3}


def decoder(kind, config_class, **settings):
    def make(seed=0):
        torch.manual_seed(seed)
        sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "head_dim": 8}
        heads = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
        return kind(config_class(**sizes, **heads, pad_token_id=0, **SPREAD, **settings))

    return make


def biased_bart(seed=0):
    model = make_model("bart", seed=seed)
    model.final_logits_bias.normal_(generator=torch.Generator().manual_seed(seed))
    return model


def dropping_llama(seed=0):
    """The same random numbers must be drawn, although the models are run once more."""
    return tiny_llama(seed=seed, attention_dropout=0.2 * (seed == 0), **SPREAD)


MODELS = {
    "llama": (dropping_llama, language_rows),
    "llama, tied": (lambda seed=0: tiny_llama(seed=seed, tie_word_embeddings=True), language_rows),
    "gpt2": (tiny_gpt2, language_rows),
    "gemma2": (decoder(Gemma2ForCausalLM, Gemma2Config, final_logit_softcapping=3.0), language_rows),
    "cohere": (decoder(CohereForCausalLM, CohereConfig, logit_scale=0.3), language_rows),
    "granite": (decoder(GraniteForCausalLM, GraniteConfig, logits_scaling=3.0), language_rows),
    "masked lm": (
        lambda seed=0: make_model("masked lm", seed=seed),
        lambda n: make_rows("masked lm", n),
    ),
    "t5": (lambda seed=0: make_model("t5", seed=seed), lambda n: make_rows("t5", n)),
    "bart": (biased_bart, lambda n: make_rows("bart", n)),
    "marian": (lambda seed=0: make_model("marian", seed=seed), lambda n: make_rows("marian", n)),
}


def build(folder, make, rows, *, teacher=None, trainer=None, **settings):
    return DistillationTrainer(
        make(),
        DistillationArguments(str(folder), **{**QUIET, "chunk_size": CHUNK, **settings}),
        train_dataset=rows(16),
        eval_dataset=rows(7),
        teacher=make(seed=1) if teacher is None else teacher,
        **(trainer or {}),
    )


def run(trainer):
    """What is logged of two steps and of an evaluation with a ragged end."""
    trainer.train()
    names = ("loss", "loss_task", "loss_kd", "agreement", "grad_norm")
    steps = [[log[name] for name in names] for log in trainer.state.log_history if "loss" in log]
    evaluated = trainer.evaluate()
    return [*sum(steps, []), *(evaluated[f"eval_{name}"] for name in names[:4])]


def run_both(folder, *model, **settings):
    """The same training in chunks and with whole logits."""
    ours, whole = [], []
    for chunk_size, into in ((CHUNK, ours), (None, whole)):
        trainer = build(folder, *model, chunk_size=chunk_size, **settings)
        into.extend(run(trainer))
        assert in_chunks(trainer) == (chunk_size is not None)
    return ours, whole


def in_chunks(trainer):
    """Whether the logits of a batch do without."""
    objective, model = trainer.objective, trainer.model
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    objective.prepare(model, batch)
    _, output = objective.sums(model, batch, divergence=Divergence(), alpha=0.5)
    return output.logits.shape[1] == 0


@pytest.mark.parametrize("name", MODELS)
def test_the_training_is_that_of_whole_logits(name, tmp_path):
    ours, whole = run_both(tmp_path, *MODELS[name], alpha=0.3)
    assert ours == pytest.approx(whole, rel=3e-5, abs=1e-7)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated")
def test_activation_checkpointing_repeats_no_teacher_and_no_loss(tmp_path):
    found = []
    for checkpointing in (False, True):
        trainer = build(tmp_path, *MODELS["llama, tied"], gradient_checkpointing=checkpointing)
        forwards = []
        trainer.teacher.register_forward_hook(lambda *_, to=forwards: to.append(1))
        found.append((run(trainer), len(forwards)))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    assert found[1][1] == found[0][1]


def test_another_model_is_evaluated_in_its_place(tmp_path):
    """As when a dense baseline is measured by the trainer of the student."""
    found = []
    for chunk_size in (CHUNK, None):
        trainer = build(tmp_path, *MODELS["llama"], chunk_size=chunk_size)
        own, other = trainer.model, tiny_llama(seed=2)
        losses = []
        for model in (own, other, own):
            trainer.model = model
            losses.append(trainer.evaluate()["eval_loss_task"])
        found.append(losses)
    ours, whole = found
    assert ours == pytest.approx(whole, rel=3e-5)
    assert ours[0] == ours[2] != ours[1]


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_half_precision(name, tmp_path):
    ours, whole = run_both(tmp_path, *MODELS[name], bf16=True, learning_rate=1e-4)
    assert ours == pytest.approx(whole, rel=2e-2)


def test_nothing_stays_attached(tmp_path):
    trainer = build(tmp_path, *MODELS["llama"])
    run(trainer)
    for model in (trainer.model, trainer.teacher):
        assert not any(each._forward_hooks or each._forward_pre_hooks for each in model.modules())


class Logits(TorchDispatchMode):
    """How many rows of `VOCABULARY` numbers any tensor has, but for the transposed output layer."""

    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for each in made if isinstance(made, list | tuple) else (made,):
            if isinstance(each, torch.Tensor) and each.shape[-1:] == (VOCABULARY,):
                rows = each.numel() // VOCABULARY
                self.most = max(self.most, 0 if each.shape == (32, VOCABULARY) else rows)
        return made


@pytest.mark.parametrize(("chunk_size", "most"), [(CHUNK, CHUNK), (None, 4 * 16)])
def test_a_whole_training_never_holds_more_logits_than_asked_for(chunk_size, most, tmp_path):
    trainer = build(tmp_path, *MODELS["llama"], chunk_size=chunk_size)
    with Logits() as logits:
        run(trainer)
    assert logits.most == most


def test_auto_leaves_small_batches_whole(tmp_path, monkeypatch):
    assert not in_chunks(build(tmp_path, *MODELS["llama"], chunk_size="auto"))
    monkeypatch.setattr(chunking, "LOGITS", 7 * VOCABULARY + 1)
    trainer = build(tmp_path, *MODELS["llama"], chunk_size="auto")
    with Logits() as logits:
        trainer.train()
    assert logits.most == 7


def test_metrics_see_all_logits(tmp_path):
    shapes = []

    def compute_metrics(prediction):
        shapes.append(prediction.predictions.shape)
        return {}

    trainer, plain = (
        build(tmp_path, *MODELS["llama"], trainer={"compute_metrics": metrics})
        for metrics in (compute_metrics, None)
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-5)
    assert shapes == [(7, 16, VOCABULARY)]
    assert in_chunks(trainer)


def test_matches_see_the_training_forward_alone(tmp_path):
    matches = {"matches": [Match("hidden"), Match("attention")]}
    ours, whole = run_both(tmp_path, *MODELS["llama"], trainer=matches)
    assert ours == pytest.approx(whole, rel=3e-5)


def test_several_teachers(tmp_path):
    teachers = [tiny_llama(seed=1, **SPREAD), tiny_llama(seed=2, layers=1, **SPREAD)]
    weights = {"teacher_weights": [1, 3]}
    ours, whole = run_both(tmp_path, *MODELS["llama"], teacher=teachers, trainer=weights)
    assert ours == pytest.approx(whole, rel=3e-5)


@pytest.mark.parametrize("teacher", ["base", None])
def test_adapters(teacher, tmp_path):
    peft = pytest.importorskip("peft")

    def student(seed=0):
        model = tiny_llama(seed=seed, **SPREAD)
        return peft.get_peft_model(model, peft.LoraConfig(r=2, init_lora_weights=False))

    ours, whole = run_both(tmp_path, student, language_rows, teacher=teacher)
    assert ours == pytest.approx(whole, rel=3e-5)


def test_a_teacher_whose_vocabulary_is_padded_further():
    student, teacher = tiny_llama(**SPREAD), tiny_llama(seed=1, **SPREAD).requires_grad_(False)
    batch = batch_of(language_rows(4))
    results = []
    for chunk_size in (CHUNK, None):
        teachers = [FrozenTeacher(teacher, slice(0, 90))]
        objective = Objective(head_of(student), teachers, [1.0], torch.no_grad, chunk_size)
        sums, _ = objective.sums(student, batch, divergence=Divergence(), alpha=0.5)
        results.append(sums)
    torch.testing.assert_close(results[0], results[1])


class DoubledLlama(LlamaForCausalLM):
    def forward(self, input_ids=None, attention_mask=None, labels=None, **inputs):
        output = super().forward(input_ids, attention_mask, **inputs)
        output.logits = 2 * output.logits
        return output


def adapted_head(seed=0):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(
        tiny_llama(seed=seed), peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
    )


def quantized_head(seed=0):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = tiny_llama(seed=seed, hidden=64)
    if seed == 1:  # the teacher
        packed = bitsandbytes.nn.Linear4bit(64, VOCABULARY, bias=False)
        packed.load_state_dict(model.lm_head.state_dict())
        model.lm_head = packed.to("cpu")
    return model


def watched_head(seed=0):
    model = tiny_llama(seed=seed)
    model.lm_head.register_forward_hook(lambda module, args, output: None)
    return model


IMPOSSIBLE = {
    "logits made otherwise": (
        lambda seed=0: tiny_llama(DoubledLlama, seed=seed, **SPREAD),
        "its logits are not those of its output layer",
    ),
    "adapted": (adapted_head, "its output layer is of type Linear of peft, not a plain Linear"),
    "quantized": (quantized_head, "its output layer is of type Linear4bit of bitsandbytes"),
    "watched": (watched_head, "something else is hooked to its output layer"),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_what_cannot_be_done_in_chunks_is_done_whole(name, tmp_path, caplog):
    make, reason = IMPOSSIBLE[name]
    with caplog.at_level(logging.WARNING, logger="hf_compress"):
        ours = run(build(tmp_path, make, language_rows))
        assert ours == run(build(tmp_path, make, language_rows, chunk_size=None))
    (message,) = {record.getMessage() for record in caplog.records}
    assert message.startswith(f"The logits are held whole, not in chunks: {reason}")
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    ("make", "rows", "reason"),
    [
        (tiny_bert, classification_rows, "there is no output layer over a vocabulary"),
        (
            lambda seed=0: make_model("whisper", seed=seed),
            lambda rows: make_rows("whisper", rows),
            "the model itself is given the labels",
        ),
        (
            lambda seed=0: make_model("ctc", seed=seed),
            lambda rows: make_rows("ctc", rows),
            "connectionist temporal classification needs them",
        ),
    ],
)
def test_heads_without_chunks(make, rows, reason, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="hf_compress"):
        build(tmp_path, make, rows, max_steps=1).train()
        # By default nobody needs to be told.
        build(tmp_path, make, rows, max_steps=1, chunk_size="auto").train()
    (record,) = caplog.records
    assert reason in record.getMessage()


def test_a_compiled_student(tmp_path, caplog):
    compiling = {"torch_compile": True, "torch_compile_backend": "eager"}
    with caplog.at_level(logging.WARNING, logger="hf_compress"):
        ours = build(tmp_path, *MODELS["gpt2"], **compiling)
        ours.train()
    assert "a compiled model does not see" in caplog.text
    assert ours.state.log_history[0]["loss_kd"] > 0


@pytest.mark.parametrize("chunk_size", [0, -1, "many", 1.5])
def test_sizes_that_are_none_are_refused(chunk_size, tmp_path):
    with pytest.raises(ValueError, match=f"`chunk_size` is {chunk_size!r}"):
        DistillationArguments(str(tmp_path), chunk_size=chunk_size)


@pytest.mark.parametrize(("given", "expected"), [("64", 64), ("none", None), ("auto", "auto")])
def test_sizes_in_words(given, expected, tmp_path):
    """As a command line gives them."""
    assert DistillationArguments(str(tmp_path), chunk_size=given).chunk_size == expected


def test_replicas_and_shards_change_nothing():
    launch("../distillation/chunked_ranks.py")
