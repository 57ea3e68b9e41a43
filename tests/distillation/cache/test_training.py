"""Trained from the cache as with the teacher beside it."""

import pytest
import torch
from distillation.cache.pairs import cached, losses, pair, rows_of, trainer_of
from tiny import tiny_bert
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast

from hf_compress.distillation.cache.cells import OUTPUTS
from hf_compress.distillation.cache.precompute import precompute_teacher
from hf_compress.distillation.divergences import Divergence


def test_rows_find_their_answers_in_every_epoch_split_and_batch(tmp_path):
    """Sorted, filtered and shuffled after the teacher was asked, over epochs of uneven batches."""

    def arranged(rows):
        rows = rows.filter(lambda row: row["input_ids"][0] % 5 > 0).sort("labels").shuffle(seed=3)
        return rows.select([*range(len(rows)), 0])

    settings = {"num_train_epochs": 3, "gradient_accumulation_steps": 2}
    settings |= {"per_device_train_batch_size": 3, "train_sampling_strategy": "group_by_length"}
    student, teacher = pair("sequence classification")
    rows = rows_of("sequence classification", 24)
    online = losses(trainer_of(student, teacher, arranged(rows), tmp_path, **settings))
    student, _ = pair("sequence classification")
    kept = arranged(cached("sequence classification", tmp_path, 24))
    ours = losses(trainer_of(student, "cached", kept, tmp_path, **settings))
    torch.testing.assert_close(ours, online, rtol=1e-5, atol=1e-6)


def test_of_few_classes_topk_is_a_bound_and_sampled_right_on_average(tmp_path):
    student, teacher = pair("causal lm")
    rows = rows_of("causal lm", 32)
    expected = trainer_of(student, teacher, rows, tmp_path).evaluate(rows)["eval_loss_kd"]

    def measured(**settings):
        kept = precompute_teacher(rows, teacher, folder=tmp_path, size=8, **settings)
        return trainer_of(student, "cached", kept, tmp_path).evaluate(kept)["eval_loss_kd"]

    assert 0 < measured(what="topk") < 0.9 * expected
    estimates = torch.tensor([measured(what="sampled", seed=seed) for seed in range(12)])
    error = estimates.std() / 12**0.5
    assert 0 < error < 0.03 * expected
    assert estimates.mean().item() == pytest.approx(expected, abs=3 * error.item())


@pytest.mark.parametrize(
    ("settings", "cut"),
    [({"what": "logits"}, (8, 1)), ({"what": "topk"}, (8, 1)), ({"what": "sampled"}, (8, 1))],
)
def test_loss_and_gradient_do_not_depend_on_the_cut(settings, cut, tmp_path):
    rows = cached("causal lm", tmp_path, **settings)
    sequential = {"train_sampling_strategy": "sequential", "learning_rate": 0.0}

    def measured(batch_size, accumulation):
        student, _ = pair("causal lm")
        return losses(
            trainer_of(
                student,
                "cached",
                rows,
                tmp_path,
                per_device_train_batch_size=batch_size,
                gradient_accumulation_steps=accumulation,
                **sequential,
            )
        )

    torch.testing.assert_close(measured(2, 4), measured(*cut), rtol=1e-5, atol=1e-6)
    student, _ = pair("causal lm")
    scaling = trainer_of(student, "cached", rows, tmp_path).check_scaling()
    assert scaling.agrees, str(scaling)


def tokenizer(side="right"):
    from tokenizers import Tokenizer, models

    inner = Tokenizer(models.WordLevel({f"w{i}": i for i in range(96)}, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="w1", padding_side=side)


def ragged(rows):
    """As a tokenizer gives them: without padding, labels or masks of it."""
    return rows.map(
        lambda row: {
            "input_ids": [i for i, m in zip(row["input_ids"], row["attention_mask"], strict=True) if m]
        }
    ).remove_columns(["attention_mask", "labels"])


@pytest.mark.parametrize("what", ["logits", "sampled"])
def test_padding_by_the_collator_makes_no_difference(what, tmp_path):
    rows = ragged(rows_of("causal lm"))
    collator = DataCollatorForLanguageModeling(tokenizer(), mlm=False)
    student, teacher = pair("causal lm")
    kept = [
        precompute_teacher(
            rows, teacher, what=what, data_collator=collator, batch_size=size, folder=tmp_path
        )
        for size in (1, 7)
    ]
    trainers = [
        trainer_of(student, "cached", each, tmp_path, collator=collator, learning_rate=0.0)
        for each in kept
    ]
    alone, together = (losses(trainer) for trainer in trainers)
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5)
    if what == "logits":
        online = losses(
            trainer_of(student, teacher, rows, tmp_path, collator=collator, learning_rate=0.0)
        )
        torch.testing.assert_close(alone, online, rtol=1e-5, atol=1e-6)


def test_padding_on_the_left_which_changes_what_counts_is_refused(tmp_path):
    rows = ragged(rows_of("causal lm"))
    collator = DataCollatorForLanguageModeling(tokenizer("left"), mlm=False)
    student, teacher = pair("causal lm")
    kept = precompute_teacher(rows, teacher, data_collator=collator, batch_size=1, folder=tmp_path)
    trainer = trainer_of(student, "cached", kept, tmp_path, collator=collator)
    with pytest.raises(ValueError, match=r"answered to \[.*with padding on the right"):
        trainer.train()


@pytest.mark.parametrize(
    ("case", "what", "divergence"),
    [
        ("causal lm", "logits", "forward_kl"),
        ("causal lm", "logits", "cosine"),
        ("causal lm", "topk", "jsd"),
        ("causal lm", "sampled", "skew_kl"),
        ("masked lm", "sampled", "forward_kl"),
        ("t5", "topk", "reverse_kl"),
    ],
)
def test_the_training_in_chunks_is_that_of_whole_logits(case, what, divergence, tmp_path, caplog):
    """With an evaluation whose last batch is ragged."""
    size = {} if what == "logits" else {"size": 8, "temperature": 2.0}
    rows = cached(case, tmp_path, what=what, **size)
    found = []
    for chunk_size in (None, 3):
        student, _ = pair(case)
        settings = {"chunk_size": chunk_size, "divergence": divergence, "alpha": 0.3}
        trainer = trainer_of(student, "cached", rows, tmp_path, **settings)
        batch = trainer.data_collator([rows[i] for i in range(4)])
        assert trainer.objective.prepare(student, batch).in_chunks == (chunk_size is not None)
        evaluated = trainer.evaluate(rows.select(range(7)))
        names = ("eval_loss", "eval_loss_task", "eval_loss_kd", "eval_agreement")
        found.append((losses(trainer), [evaluated[name] for name in names]))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=3e-5, atol=1e-6)
    assert found[0][1] == pytest.approx(found[1][1], rel=3e-5)
    assert "held whole" not in caplog.text


def test_no_teacher_is_in_memory_and_workers_collate_too(tmp_path):
    import gc
    import weakref

    student, teacher = pair("causal lm")
    rows = precompute_teacher(rows_of("causal lm"), teacher, folder=tmp_path)
    gone = weakref.ref(teacher)
    del teacher
    gc.collect()
    assert gone() is None
    trainer = trainer_of(student, "cached", rows, tmp_path, dataloader_num_workers=1)
    assert trainer.teachers == []
    assert trainer.teacher is None
    assert (losses(trainer)[:, 2] != 0).all()


def test_a_teacher_of_labels_in_another_order_teaches_by_name(tmp_path):
    names, order = ["good", "bad", "ugly"], [2, 0, 1]
    student = tiny_bert(id2label=dict(enumerate(names)), initializer_range=0.3)
    teacher = tiny_bert(
        seed=1, id2label=dict(enumerate(names[i] for i in order)), initializer_range=0.3
    ).eval()
    rows = rows_of("sequence classification")
    kept = precompute_teacher(rows, teacher, folder=tmp_path)
    ours = trainer_of(student, "cached", kept, tmp_path).evaluate(kept)
    online = trainer_of(student, teacher, rows, tmp_path).evaluate(rows)
    assert ours["eval_loss_kd"] == pytest.approx(online["eval_loss_kd"], rel=1e-5)


def test_a_vocabulary_that_is_padded_further_is_cut(tmp_path):
    student, teacher = pair("causal lm")
    teacher.resize_token_embeddings(100)
    rows = rows_of("causal lm")
    with torch.no_grad():
        batch = {name: torch.tensor(rows[name]) for name in ("input_ids", "attention_mask", "labels")}
        labels = batch["labels"][:, 1:]
        whole = [
            m(batch["input_ids"], batch["attention_mask"]).logits[:, :-1] for m in (student, teacher)
        ]
        ours, theirs = (each[labels != -100][:, :90] for each in whole)
        expected = Divergence(temperature=2.0).between_classes(ours, theirs).mean().item()
    kept = precompute_teacher(rows, teacher, what="logits", vocabulary=90, folder=tmp_path)
    measured = trainer_of(student, "cached", kept, tmp_path).evaluate(kept)
    assert measured["eval_loss_kd"] == pytest.approx(expected, rel=1e-5)
    kept = precompute_teacher(rows, teacher, what="logits", folder=tmp_path)
    with pytest.raises(ValueError, match=r"96 entries, the cached teacher's 100.*vocabulary="):
        trainer_of(student, "cached", kept, tmp_path)


def test_without_asking_for_them_answers_are_ignored(tmp_path):
    student, teacher = pair("sequence classification")
    rows = cached("sequence classification", tmp_path)
    trainer = trainer_of(student, teacher, rows, tmp_path)
    assert OUTPUTS not in next(iter(trainer.get_train_dataloader()))
