import pytest
import torch
from comparing import assert_equal
from datasets import Dataset
from distillation.heads import make_model
from tiny import classification_rows, tiny_bert, tiny_llama
from transformers import Trainer, TrainingArguments

from hf_compress import DistillationArguments, DistillationTrainer, teacher_sequences
from hf_compress.distillation.divergences import Divergence
from hf_compress.distillation.on_policy import OnPolicy
from hf_compress.distillation.sampling import rewritten

SPREAD = {"initializer_range": 0.3, "eos_token_id": 7}
ROWS = 16


def rows(count=ROWS):
    """Ragged rows, the labels behind prompts of 1 to 4 tokens; the fourth has none."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for i in range(count):
        length, prompt = 6 + i % 5, 1 + i % 4
        ids = torch.randint(8, 96, (length,), generator=generator).tolist()
        labels = [-100] * prompt + ids[prompt:]
        made.append(
            {
                "input_ids": ids,
                "attention_mask": [1] * length,
                "labels": labels if i != 3 else [-100] * length,
            }
        )
    return Dataset.from_list(made)


def pad(features, left=False):
    length = max(len(row["input_ids"]) for row in features)

    def filled(row, value):
        filling = [value] * (length - len(row))
        return filling + row if left else row + filling

    values = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {
        name: torch.tensor([filled(row[name], value) for row in features])
        for name, value in values.items()
    }


def rows_of(batch):
    """What is not padding: (ids, labels) of each row."""
    return [
        (ids[mask.bool()].tolist(), labels[mask.bool()].tolist())
        for ids, mask, labels in zip(
            batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True
        )
    ]


@torch.no_grad()
def by_hand(model, row):
    """Token by token, each the most probable one."""
    limit = sum(label != -100 for label in row["labels"])
    prompt = row["input_ids"][: len(row["labels"]) - limit]
    ids = list(prompt)
    for _ in range(limit):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == 7:
            break
    return ids, [-100] * len(prompt) + ids[len(prompt) :]


@pytest.mark.parametrize("left", [False, True])
def test_the_most_probable_text_by_hand(left):
    model = tiny_llama(seed=5, **SPREAD)
    found = rewritten(model, pad(list(rows()), left=left), temperature=0)
    expected = [by_hand(model, row) for row in rows()]
    assert rows_of(found) == expected
    assert (found["labels"][found["attention_mask"] == 0] == -100).all()


def test_a_text_ends_where_the_model_ends_it():
    """A model that says 7 after the prompt whatever it is."""
    model = tiny_llama(tie_word_embeddings=False, **SPREAD)
    torch.nn.init.zeros_(model.lm_head.weight)
    model.lm_head.bias = torch.nn.Parameter(torch.eye(96)[7])
    found = rewritten(model, pad(list(rows(3))), temperature=0)
    for (ids, labels), row in zip(rows_of(found), rows(3), strict=True):
        prompt = row["labels"].count(-100)
        assert ids == [*row["input_ids"][:prompt], 7]
        assert labels == [-100] * prompt + [7]


def test_a_text_without_a_prompt_begins_with_its_first_token():
    row = {"input_ids": [9, 10, 11], "attention_mask": [1, 1, 1], "labels": [9, 10, 11]}
    (found,) = rows_of(rewritten(tiny_llama(**SPREAD), pad([row]), temperature=0))
    assert found[0][0] == 9
    assert found[1][0] == -100
    assert len(found[0]) <= 3


@pytest.mark.parametrize("head", ["t5", "bart", "marian"])
def test_an_encoder_decoder_answers_its_input_by_hand(head):
    model = make_model(head)
    model.generation_config.eos_token_id = None
    ids, mask = torch.randint(5, 90, (3, 6)), torch.ones(3, 6, dtype=torch.long)
    mask[1, 4:] = 0
    labels = torch.tensor([[5, 6, 7, 8], [5, 6, -100, -100], [-100] * 4])
    given = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    found = rewritten(model, given, temperature=0)
    assert torch.equal(found["input_ids"], ids)
    for row, limit in enumerate((4, 2, 0)):
        decoder = [model.config.decoder_start_token_id]
        for _ in range(limit):
            logits = model(
                input_ids=ids[[row]],
                attention_mask=mask[[row]],
                decoder_input_ids=torch.tensor([decoder]),
            ).logits
            decoder.append(int(logits[0, -1].argmax()))
        kept = found["labels"][row]
        assert kept[kept != -100].tolist() == decoder[1:]


def test_drawn_tokens_have_the_probabilities_of_the_model():
    """Whatever its own settings of generation would make of them."""
    model = tiny_llama(**SPREAD)
    model.generation_config.top_k = 1
    model.generation_config.repetition_penalty = 5.0
    torch.manual_seed(0)
    row = {"input_ids": [9, 10], "attention_mask": [1, 1], "labels": [-100, 10]}
    found = rewritten(model, pad([row] * 4000), temperature=2.0)
    counts = torch.bincount(found["input_ids"][:, 1], minlength=96) / 4000
    expected = (model(input_ids=torch.tensor([[9]])).logits[0, -1] / 2.0).softmax(-1)
    assert (counts - expected).abs().sum() < 0.15
    assert expected.max() < 0.9


def test_the_steps_that_are_drawn_are_a_function_of_the_step():
    drawn, on_another_process = (
        [OnPolicy(0.3, 1.0, 42, process).in_step(step) for step in range(2000)] for process in (0, 1)
    )
    assert drawn == on_another_process
    assert sum(drawn) / 2000 == pytest.approx(0.3, abs=0.03)
    assert not any(OnPolicy(0.0, 1.0, 1, 0).in_step(step) for step in range(100))
    assert all(OnPolicy(1.0, 1.0, 1, 0).in_step(step) for step in range(100))


# In the trainer


def trainer(folder, student=None, teacher=None, *, trainer=None, **settings):
    defaults = {
        "per_device_train_batch_size": 8,
        "max_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "max_grad_norm": 1e9,
        "train_sampling_strategy": "sequential",
    }
    return DistillationTrainer(
        tiny_llama(**SPREAD) if student is None else student,
        DistillationArguments(str(folder), **(defaults | settings)),
        teacher=tiny_llama(seed=1, **SPREAD) if teacher is None else teacher,
        **({"train_dataset": rows(), "data_collator": pad} | (trainer or {})),
    )


def logs(built):
    built.train()
    return [row for row in built.state.log_history if "loss" in row]


def weights(built):
    return {name: value.clone() for name, value in built.model.state_dict().items()}


def test_the_loss_is_the_distance_on_what_the_student_wrote(tmp_path):
    student, teacher = tiny_llama(**SPREAD), tiny_llama(seed=1, **SPREAD)
    batch = rewritten(student, pad([rows()[i] for i in range(8)]), temperature=0)
    with torch.no_grad():
        ours, theirs = (
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
            for model in (student, teacher)
        )
    counted = batch["labels"][:, 1:] != -100
    distance = Divergence(temperature=2.0).between_classes(ours[counted], theirs[counted])
    (first, _) = logs(trainer(tmp_path, student, teacher, on_policy=1.0, on_policy_temperature=0.0))
    assert first["loss"] == pytest.approx(distance.mean().item(), rel=1e-5)
    assert first["on_policy_loss_kd"] == pytest.approx(first["loss"], rel=1e-5)
    assert 0 <= first["on_policy_agreement"] <= 1
    assert "loss_task" not in first


@pytest.mark.parametrize("size", [1, 2, 4])
def test_loss_and_gradient_do_not_depend_on_the_cut(tmp_path, size):
    """Of the most probable text; drawn text is another for another cut."""
    settings = {"learning_rate": 0.0, "on_policy": 1.0, "on_policy_temperature": 0.0}
    whole = logs(trainer(tmp_path, **settings))
    cut = logs(
        trainer(
            tmp_path,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size,
            **settings,
        )
    )
    for ours, theirs in zip(cut, whole, strict=True):
        for name in ("loss", "on_policy_loss_kd", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5), name


def test_steps_of_both_kinds_are_logged_apart(tmp_path):
    built = trainer(tmp_path, on_policy=0.5, max_steps=12)
    found = ["on_policy_loss_kd" in row for row in logs(built)]
    expected = OnPolicy(0.5, 1.0, built.args.seed, 0)
    assert found == [expected.in_step(step) for step in range(12)]
    assert 0 < sum(found) < 12
    for row in built.state.log_history[:12]:
        assert ("loss_task" in row) != ("on_policy_loss_kd" in row)


def test_resuming_equals_never_having_stopped(tmp_path):
    def run(**settings):
        student = tiny_llama(attention_dropout=0.1, **SPREAD)
        return trainer(
            tmp_path, student, on_policy=0.5, max_steps=8, learning_rate=1e-2, save_steps=3, **settings
        )

    whole = run(save_strategy="steps")
    whole.train()
    resumed = run()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_equal(weights(resumed), weights(whole))


def test_drawing_leaves_the_random_states_alone():
    student, batches = tiny_llama(**SPREAD), [pad([rows()[i] for i in range(4)])]
    before = torch.get_rng_state()

    def ids(step, process=0):
        return OnPolicy(1.0, 1.0, 42, process).written(student, batches, step)[0]["input_ids"].tolist()

    assert ids(0) == ids(0)
    assert ids(0) != ids(1)
    assert ids(0) != ids(0, process=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_student_comes_closer_where_it_goes_itself(tmp_path):
    losses = [
        row["on_policy_loss_kd"]
        for row in logs(
            trainer(tmp_path, on_policy=1.0, max_steps=40, learning_rate=1e-2, temperature=1.0)
        )
    ]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_an_encoder_decoder_writes_too(tmp_path):
    built = DistillationTrainer(
        make_model("t5"),
        DistillationArguments(str(tmp_path), on_policy=1.0, max_steps=2, logging_steps=1, use_cpu=True),
        teacher=make_model("t5", seed=1),
        train_dataset=rows(),
        data_collator=pad,
    )
    assert all(row["on_policy_loss_kd"] > 0 for row in logs(built))


def test_evaluation_is_on_the_data(tmp_path):
    evaluated = [
        trainer(tmp_path, on_policy=part, learning_rate=0.0, trainer={"eval_dataset": rows()})
        for part in (0.0, 1.0)
    ]
    for built in evaluated:
        built.train()
    first, second = (built.evaluate()["eval_loss"] for built in evaluated)
    assert first == pytest.approx(second)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"on_policy": 1.5}, r"`on_policy` must be in \[0, 1\], got 1.5"),
        ({"on_policy_temperature": -1.0}, "`on_policy_temperature` must be 0 or more, got -1.0"),
    ],
)
def test_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        DistillationArguments("out", **settings)


def test_heads_that_write_nothing_are_refused(tmp_path):
    with pytest.raises(NotImplementedError, match="Only causal and sequence-to-sequence"):
        trainer(
            tmp_path,
            tiny_bert(),
            tiny_bert(seed=1),
            on_policy=0.5,
            trainer={"train_dataset": classification_rows()},
        )


def test_batches_that_cannot_be_continued_are_refused(tmp_path):
    def packed(features):
        return {**pad(features), "position_ids": torch.zeros(1)}

    with pytest.raises(ValueError, match="A batch with position_ids cannot be continued"):
        trainer(tmp_path, on_policy=1.0, trainer={"data_collator": packed}).train()


# As data


def test_the_teacher_writes_a_dataset(tmp_path):
    teacher = tiny_llama(seed=5, **SPREAD)
    written = teacher_sequences(rows(), teacher, pad, batch_size=5)
    expected = [by_hand(teacher, row) for row in rows()]
    assert [(row["input_ids"], row["labels"]) for row in written] == expected
    student = tiny_llama(**SPREAD)
    arguments = TrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, save_strategy="no")
    Trainer(student, arguments, train_dataset=written, data_collator=pad).train()


def test_an_encoder_decoder_writes_labels():
    teacher = make_model("t5")
    written = teacher_sequences(rows(), teacher, pad, batch_size=5)
    assert written["input_ids"] == rows()["input_ids"]
    assert written[3]["labels"] == []
    assert all(row["labels"] for i, row in enumerate(written) if i != 3)


def test_drawn_data_depends_on_the_seed_alone():
    teacher = tiny_llama(seed=5, **SPREAD)
    before = torch.get_rng_state()
    first, again, other = (
        teacher_sequences(rows(), teacher, pad, temperature=1.0, seed=seed)["labels"][:]
        for seed in (0, 0, 1)
    )
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), before)


def test_beams_find_no_less_probable_texts():
    teacher = tiny_llama(seed=5, **{**SPREAD, "eos_token_id": None})

    @torch.no_grad()
    def logarithm(row):
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
        logs = teacher(input_ids=ids).logits[0, :-1].log_softmax(-1)
        at = labels != -100
        return logs[at].gather(-1, labels[at, None]).sum().item()

    greedy, searched = (
        [logarithm(row) for row in teacher_sequences(rows(), teacher, pad, beams=beams, batch_size=1)]
        for beams in (1, 4)
    )
    assert sum(searched) > sum(greedy)


def test_beams_beside_a_temperature_are_refused():
    with pytest.raises(ValueError, match="beams=4 look for the most probable text"):
        teacher_sequences(rows(), tiny_llama(**SPREAD), pad, beams=4, temperature=1.0)
