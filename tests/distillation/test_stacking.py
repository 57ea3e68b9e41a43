"""On other trainers, and with students and teachers that are adapted or quantized."""

from dataclasses import dataclass

import pytest
import torch
from distillation.heads import make_model, make_rows
from tiny import VOCABULARY, classification_rows, language_rows, tiny_bert, tiny_llama
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

from hf_compress import DistillationArguments, DistillationMixin, DistillationTrainer
from hf_compress.distillation.arguments import DistillationArgumentsMixin
from hf_compress.distillation.divergences import Divergence

peft = pytest.importorskip("peft")
trl = pytest.importorskip("trl")

# trl's own default.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated")

QUIET = {
    "per_device_train_batch_size": 4,
    "max_steps": 3,
    "logging_steps": 1,
    "learning_rate": 1e-2,
    "save_strategy": "no",
    "use_cpu": True,
    "disable_tqdm": True,
}


class DistillSFT(DistillationMixin, trl.SFTTrainer):
    pass


@dataclass
class DistillSFTConfig(DistillationArgumentsMixin, trl.SFTConfig):
    pass


class DistillSeq2Seq(DistillationMixin, Seq2SeqTrainer):
    pass


@dataclass
class DistillSeq2SeqArguments(DistillationArgumentsMixin, Seq2SeqTrainingArguments):
    pass


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{index}": index for index in range(VOCABULARY)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w1")),
        pad_token="w0",
        unk_token="w1",
        eos_token="w2",
    )


def distil_sft(folder, tokenizer, student, teacher, **trainer):
    built = DistillSFT(
        student,
        DistillSFTConfig(str(folder), bf16=False, **QUIET),
        train_dataset=language_rows(),
        eval_dataset=language_rows(rows=6, seed=1),
        processing_class=tokenizer,
        teacher=teacher,
        **trainer,
    )
    built.train()
    return built


def test_sft_logs_the_same_first_loss_as_the_plain_distillation_trainer(tmp_path, tokenizer):
    sft = distil_sft(tmp_path, tokenizer, tiny_llama(), tiny_llama(seed=1))
    rows = sft.train_dataset
    plain = DistillationTrainer(
        tiny_llama(),
        DistillationArguments(str(tmp_path), **QUIET),
        data_collator=sft.data_collator,
        train_dataset=rows.remove_columns(set(rows.column_names) - {"input_ids", "labels"}),
        teacher=tiny_llama(seed=1),
    )
    plain.train()
    for ours, theirs in zip(sft.state.log_history[:3], plain.state.log_history[:3], strict=True):
        for name in ("loss", "loss_task", "loss_kd", "agreement"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5)
    evaluated = sft.evaluate()
    expected = (evaluated["eval_loss_task"] + evaluated["eval_loss_kd"]) / 2
    assert evaluated["eval_loss"] == pytest.approx(expected)


def test_sft_with_adapters_that_it_adds_itself(tmp_path, tokenizer):
    student = tiny_llama()
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = distil_sft(tmp_path, tokenizer, student, tiny_llama(seed=1), peft_config=config)
    assert isinstance(trainer.model, peft.PeftModel)
    assert trainer.state.log_history[0]["loss_kd"] > 0


def test_a_model_that_sft_has_trained_can_teach_itself(tmp_path, tokenizer):
    """SFTTrainer patches the forward of its model with a closure, which a copy would share."""
    student = tiny_llama()
    trl.SFTTrainer(
        student,
        trl.SFTConfig(str(tmp_path), bf16=False, **QUIET),
        train_dataset=language_rows(),
        processing_class=tokenizer,
    ).train()
    trainer = distil_sft(tmp_path, tokenizer, student, "self")
    losses = [log["loss_kd"] for log in trainer.state.log_history if "loss_kd" in log]
    assert losses[0] == pytest.approx(0, abs=1e-6)
    assert losses[2] > 1e-5


def test_sft_in_chunks(tmp_path, tokenizer):
    runs = []
    for chunk_size in (5, None):
        trainer = DistillSFT(
            tiny_llama(),
            DistillSFTConfig(str(tmp_path), bf16=False, chunk_size=chunk_size, **QUIET),
            train_dataset=language_rows(),
            processing_class=tokenizer,
            teacher=tiny_llama(seed=1),
        )
        trainer.train()
        runs.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
        batch = trainer.data_collator([trainer.train_dataset[0]])
        sums = trainer.objective.sums(trainer.model, batch, divergence=Divergence(), alpha=0.5)
        assert (sums[1].logits.shape[1] == 0) == (chunk_size is not None)
    assert runs[0] == pytest.approx(runs[1], rel=1e-5)


def test_sft_options_that_would_be_ignored_are_refused(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="loss_type='dft' would be ignored"):
        DistillSFT(
            tiny_llama(),
            DistillSFTConfig(str(tmp_path), bf16=False, loss_type="dft", **QUIET),
            train_dataset=language_rows(),
            processing_class=tokenizer,
            teacher=tiny_llama(seed=1),
        )


def test_on_seq2seq_trainer(tmp_path):
    trainer = DistillSeq2Seq(
        tiny_bert(),
        DistillSeq2SeqArguments(str(tmp_path), alpha=0.9, **QUIET),
        train_dataset=classification_rows(),
        eval_dataset=classification_rows(rows=4),
        teacher=tiny_bert(seed=1),
    )
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(0.1 * log["loss_task"] + 0.9 * log["loss_kd"], rel=1e-5)
    assert "eval_agreement" in trainer.evaluate()


def test_a_trainer_that_generates_evaluates_the_same_loss(tmp_path):
    """Seq2SeqTrainer asks the model for its loss, where it generates."""
    rows = make_rows("t5", 7)
    losses = []
    for generate in (False, True):
        trainer = DistillSeq2Seq(
            make_model("t5"),
            DistillSeq2SeqArguments(
                str(tmp_path), predict_with_generate=generate, generation_max_length=5, **QUIET
            ),
            eval_dataset=rows,
            teacher=make_model("t5", seed=1),
            compute_metrics=lambda prediction: {"length": prediction.predictions[0].shape[-1]},
        )
        losses.append({name: value for name, value in trainer.evaluate().items() if "loss" in name})
    assert losses[0].keys() == {"eval_loss", "eval_loss_task", "eval_loss_kd"}
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_a_lora_student_trains_its_adapters_only(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    student = peft.get_peft_model(tiny_bert(), config)
    before = {name: value.clone() for name, value in student.named_parameters()}
    trainer = DistillationTrainer(
        student,
        DistillationArguments(str(tmp_path), **QUIET),
        train_dataset=classification_rows(),
        teacher=tiny_bert(seed=1),
    )
    trainer.train()
    for name, value in student.named_parameters():
        moved = not torch.equal(value, before[name])
        assert moved == ("lora_" in name or "modules_to_save" in name), name


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_base_with_adapters_learns_from_a_quantized_teacher(bits, tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM

    from hf_compress import quantized

    tiny_llama(hidden=64).save_pretrained(tmp_path / "student")
    tiny_llama(hidden=64, seed=1).save_pretrained(tmp_path / "teacher")
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path / "student", quantization_config=quantized(bits=bits)
    )
    base = peft.prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    student = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    trainer = DistillationTrainer(
        student,
        DistillationArguments(str(tmp_path), **QUIET),
        train_dataset=language_rows(rows=4),
        teacher=str(tmp_path / "teacher"),
        teacher_bits=bits,
    )
    trainer.train()
    assert trainer.teacher.is_quantized
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("bits", [4, 8])
def test_the_student_as_it_was_can_teach_in_few_bits(bits, tmp_path):
    pytest.importorskip("bitsandbytes")
    student = tiny_bert(hidden=64, initializer_range=0.3)
    trainer = DistillationTrainer(
        student,
        DistillationArguments(str(tmp_path), **QUIET),
        train_dataset=classification_rows(),
        teacher="self",
        teacher_bits=bits,
    )
    trainer.train()
    assert trainer.teacher.is_quantized
    assert not student.config.to_dict().get("quantization_config")
    assert trainer.state.log_history[0]["loss_kd"] > 0
