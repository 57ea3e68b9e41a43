"""What is kept of the answers, and where; and what is refused when it is asked for, or used."""

import copy

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, DatasetDict, concatenate_datasets, load_from_disk
from distillation.cache.pairs import cached, losses, pair, rows_of, trainer_of
from tiny import VOCABULARY, tiny_bert, tiny_llama
from transformers import BertModel, default_data_collator

from hf_compress.distillation.cache.cells import OUTPUTS, Origin, from_bytes, to_bytes
from hf_compress.distillation.cache.keys import fingerprint
from hf_compress.distillation.cache.precompute import precompute_teacher


def cell(rows, number=0):
    return from_bytes(rows[number][OUTPUTS])


def origin(rows):
    return Origin.from_json(cell(rows).origin)


class Counting:
    """A collator that counts what it was asked for, and may break down."""

    def __init__(self, after=None):
        self.rows, self.after = 0, after

    def __call__(self, rows):
        self.rows += len(rows)
        if self.after is not None and self.rows > self.after:
            raise KeyboardInterrupt
        return default_data_collator(rows)


def test_the_rows_stay_as_they_are_beside_a_new_column(tmp_path):
    before = rows_of("causal lm")
    rows = cached("causal lm", tmp_path)
    assert rows.column_names == [*before.column_names, OUTPUTS]
    assert rows.remove_columns(OUTPUTS).to_list() == before.to_list()


def test_logits_are_those_of_the_items_alone(tmp_path):
    _, teacher = pair("causal lm")
    rows = cached("causal lm", tmp_path, what="logits")
    for number in (0, 7):
        row = rows[number]
        length = sum(row["attention_mask"])
        with torch.no_grad():
            expected = teacher(torch.tensor([row["input_ids"][:length]])).logits[0, : length - 1]
        torch.testing.assert_close(cell(rows, number).answers["logits"], expected)


@pytest.mark.parametrize("what", ["topk", "sampled"])
def test_a_shortlist_holds_the_logarithms_of_softened_probabilities_in_halves(what, tmp_path):
    whole = cached("causal lm", tmp_path, what="logits")
    rows = cached("causal lm", tmp_path, what=what, temperature=3.0, size=6)
    answers = cell(rows, 2).answers
    assert answers["ids"].shape == answers["logs"].shape == (len(answers["rest"]), 6)
    assert answers["logs"].dtype == answers["rest"].dtype == torch.float16
    logs = F.log_softmax(cell(whole, 2).answers["logits"] / 3.0, -1)
    torch.testing.assert_close(
        answers["logs"].float(), logs.gather(-1, answers["ids"]), rtol=1e-3, atol=1e-3
    )
    assert (answers["ids"][:, 0] == logs.argmax(-1)).all()
    assert origin(rows).temperature == 3.0
    assert origin(whole).temperature is None


def test_what_is_drawn_depends_on_the_row_and_the_seed_alone(tmp_path):
    _, teacher = pair("causal lm")
    rows = rows_of("causal lm")

    def drawn(rows, batch_size, seed=0):
        kept = precompute_teacher(
            rows, teacher, size=6, batch_size=batch_size, folder=tmp_path, seed=seed
        )
        return {cell(kept, i).key: cell(kept, i).answers["ids"] for i in range(len(kept))}

    one, other = drawn(rows, 5), drawn(rows.shuffle(seed=1), 1)
    assert one.keys() == other.keys()
    assert all((one[key] == other[key]).all() for key in one)
    again = drawn(rows, 5, seed=1)
    assert any((one[key] != again[key]).any() for key in one)


@pytest.mark.parametrize(("vocabulary", "most"), [(49_152, 90), (128_256, 92)])
def test_a_token_takes_less_than_100_bytes(vocabulary, most, tmp_path):
    teacher = tiny_llama(seed=1).eval()
    teacher.resize_token_embeddings(vocabulary)
    ids = torch.randint(5, VOCABULARY, (2, 64))
    rows = Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})
    for what in ("topk", "sampled"):
        kept = precompute_teacher(rows, teacher, what=what, folder=tmp_path)
        assert len(kept[0][OUTPUTS]) < 63 * most + 500  # what a row says of itself
        assert cell(kept).answers["ids"].max() < vocabulary


def test_ids_of_large_vocabularies_come_back_whole():
    ids = torch.tensor([[0, 65_535, 65_536, 151_935, 262_143]])
    kept = from_bytes(to_bytes({"ids": ids, "logs": torch.zeros(1, 5)}, "key", "{}"))
    assert kept.answers["ids"].tolist() == ids.tolist()
    assert (kept.key, kept.origin) == ("key", "{}")


def test_a_dtype_for_what_is_kept(tmp_path):
    rows = cached("sequence classification", tmp_path, dtype=torch.bfloat16)
    assert cell(rows).answers["logits"].dtype == torch.bfloat16


def test_a_path_is_loaded_by_the_class_that_it_was_saved_as(tmp_path):
    _, teacher = pair("sequence classification")
    teacher.save_pretrained(tmp_path / "teacher")
    rows = rows_of("sequence classification")
    kept = precompute_teacher(rows, str(tmp_path / "teacher"), folder=tmp_path)
    expected = cached("sequence classification", tmp_path)
    torch.testing.assert_close(cell(kept).answers["logits"], cell(expected).answers["logits"])
    assert origin(kept).teacher == origin(expected).teacher
    BertModel(teacher.config).save_pretrained(tmp_path / "headless")
    with pytest.raises(ValueError, match=r"saved as BertModel, whose head is not known"):
        precompute_teacher(rows, str(tmp_path / "headless"), folder=tmp_path)


def test_in_8_bit(tmp_path):
    pytest.importorskip("bitsandbytes")
    teacher = tiny_bert(hidden=64, seed=1).eval()
    rows = rows_of("sequence classification")
    kept = precompute_teacher(rows, teacher, bits=8, folder=tmp_path)
    whole = precompute_teacher(rows, teacher, folder=tmp_path)
    assert (origin(kept).precision, origin(whole).precision) == ("8 bit", "float32")
    difference = cell(kept).answers["logits"] - cell(whole).answers["logits"]
    assert 0 < difference.abs().max() < 0.05


def test_the_teacher_is_left_as_it_was(tmp_path):
    teacher = tiny_bert(seed=1).train()
    before = copy.deepcopy(teacher.state_dict())
    precompute_teacher(rows_of("sequence classification"), teacher, folder=tmp_path)
    assert teacher.training
    assert all(parameter.requires_grad for parameter in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_an_interrupted_call_goes_on(tmp_path):
    _, teacher = pair("causal lm")
    rows = rows_of("causal lm", 20)
    settings = {"folder": tmp_path, "batch_size": 4, "rows_per_file": 8}
    first = Counting(after=8 + 13)  # a look at the first batch, twice; then the second file
    with pytest.raises(KeyboardInterrupt):
        precompute_teacher(rows, teacher, data_collator=first, **settings)
    second = Counting()
    kept = precompute_teacher(rows, teacher, data_collator=second, **settings)
    assert second.rows == 8 + 12
    whole = precompute_teacher(rows, teacher, batch_size=4, folder=tmp_path / "other")
    for number in range(20):
        ours, expected = cell(kept, number), cell(whole, number)
        assert ours.key == expected.key
        assert all(torch.equal(ours.answers[name], expected.answers[name]) for name in ours.answers)
    third = Counting()
    precompute_teacher(rows, teacher, data_collator=third, **settings)
    assert third.rows == 8  # all is there


def test_another_teacher_setting_or_collator_asks_anew(tmp_path):
    _, teacher = pair("causal lm")
    rows = rows_of("causal lm")

    def asked(rows=rows, teacher=teacher, **settings):
        collator = Counting()
        precompute_teacher(rows, teacher, data_collator=collator, folder=tmp_path, **settings)
        return collator.rows > 16

    def shorter(batch):
        return {name: value[:, :8] for name, value in default_data_collator(batch).items()}

    assert asked()
    assert not asked()
    assert asked(size=5)
    assert asked(temperature=1.0)
    assert asked(what="topk")
    assert asked(seed=1)
    assert asked(dtype=torch.float32)
    assert asked(rows=rows.select(range(11)))
    with torch.no_grad():
        teacher.lm_head.weight[0, 0] += 1e-3
    assert asked()
    kept = precompute_teacher(rows, teacher, data_collator=shorter, folder=tmp_path)
    assert len(cell(kept).answers["rest"]) <= 7


def test_fingerprints_tell_weights_apart():
    one, other = tiny_bert(seed=0), tiny_bert(seed=0)
    assert fingerprint(one) == fingerprint(other)
    assert fingerprint(one.bfloat16()) != fingerprint(other)
    with torch.no_grad():
        other.bert.pooler.dense.bias[3] += 1e-6
    assert fingerprint(other) != fingerprint(tiny_bert(seed=0))


def test_answers_are_saved_and_split_with_the_rows(tmp_path):
    rows = cached("causal lm", tmp_path)
    halves = rows.train_test_split(test_size=0.5, seed=0)
    halves.save_to_disk(tmp_path / "saved")
    loaded = concatenate_datasets(list(load_from_disk(tmp_path / "saved").values()))
    student, _ = pair("causal lm")
    assert (losses(trainer_of(student, "cached", loaded, tmp_path))[:, 2] != 0).all()


def refused(rows, tmp_path, match, student=None, **settings):
    student = student or pair("causal lm")[0]
    with pytest.raises(ValueError, match=match):
        trainer_of(student, "cached", rows, tmp_path, **settings).train()


def test_rows_that_became_others_are_refused_at_the_first_batch(tmp_path):
    rows = cached("causal lm", tmp_path)
    shifted = rows.map(lambda row: {"input_ids": [(i + 1) % 96 for i in row["input_ids"]]})
    refused(shifted, tmp_path, "input_ids of a row.*not what the teacher was asked about")
    shorter = rows.map(
        lambda row: {name: row[name][:9] for name in ("input_ids", "attention_mask", "labels")}
    )
    refused(shorter, tmp_path, "tokenizer, truncation and collator")
    masked = rows.map(lambda row: {"labels": [-100, -100, *row["labels"][2:]]})
    refused(masked, tmp_path, "which of its tokens have a label")
    swapped = rows.remove_columns(OUTPUTS).add_column(OUTPUTS, rows[OUTPUTS][::-1])
    refused(swapped, tmp_path, "not what the teacher was asked about")


def test_other_labels_of_a_row_are_no_other_row(tmp_path):
    rows = cached("sequence classification", tmp_path)
    relabelled = rows.map(lambda row: {"labels": 2 - row["labels"]})
    student, _ = pair("sequence classification")
    trainer_of(student, "cached", relabelled, tmp_path).train()


def test_answers_of_several_teachers_are_refused(tmp_path):
    rows = rows_of("causal lm")
    one, other = (
        precompute_teacher(rows, tiny_llama(seed=seed).eval(), folder=tmp_path) for seed in (1, 2)
    )
    refused(concatenate_datasets([one, other]), tmp_path, "answers of several teachers")
    refused(one, tmp_path, "of one teacher, kept in one way", eval_rows=other)
    warmer = precompute_teacher(rows, tiny_llama(seed=1).eval(), temperature=1.0, folder=tmp_path)
    refused(one, tmp_path, "of one teacher, kept in one way", eval_rows={"warm": warmer})


def test_rows_without_answers_are_refused(tmp_path):
    rows, kept = rows_of("causal lm"), cached("causal lm", tmp_path)
    refused(rows, tmp_path, "needs a column 'teacher_outputs'")
    refused(kept, tmp_path, "The dataset for evaluation needs outputs too", eval_rows=rows)
    broken = rows.add_column(OUTPUTS, [b"nothing"] * len(rows))
    refused(broken, tmp_path, "does not hold what `precompute_teacher` writes")
    student, _ = pair("causal lm")
    with pytest.raises(ValueError, match="a row has no column 'teacher_outputs'"):
        trainer_of(student, "cached", kept, tmp_path).evaluate(rows)


def test_students_that_do_not_fit_are_refused(tmp_path):
    kept = cached("causal lm", tmp_path)
    refused(kept, tmp_path, "head is for sequence classification", student=tiny_bert())
    larger = tiny_llama()
    larger.resize_token_embeddings(100)
    refused(kept, tmp_path, "has 100 entries, the cached teacher's 96", student=larger)
    kept = cached("sequence classification", tmp_path)
    refused(kept, tmp_path, "has 4 labels, the cached teacher's 3", student=tiny_bert(num_labels=4))
    kept = cached("t5", tmp_path)
    student = pair("t5")[0]
    student.config.decoder_start_token_id = 2
    refused(kept, tmp_path, "decoder_start_token_id", student=student)


def test_trainings_that_do_not_fit_are_refused(tmp_path):
    kept = cached("causal lm", tmp_path)
    refused(kept, tmp_path, "kept at temperature 2.0, but the loss asks for 1.0", temperature=1.0)
    refused(kept, tmp_path, "'reverse_kl' is no mean", divergence="reverse_kl")
    topk = cached("causal lm", tmp_path, what="topk")
    refused(topk, tmp_path, "'logit_mse' is not defined for probabilities", divergence="logit_mse")


def test_settings_that_do_not_fit_are_refused(tmp_path):
    def refuses(case, match, rows=None, error=ValueError, **settings):
        with pytest.raises(error, match=match):
            precompute_teacher(
                rows_of(case) if rows is None else rows, pair(case)[1], folder=tmp_path, **settings
            )

    refuses("causal lm", "`what` is 'best'", what="best")
    refuses(
        "causal lm", "`size` is 7, but it goes with what='topk' or 'sampled'", what="logits", size=7
    )
    refuses("causal lm", "fewer than the 96 classes", size=96)
    refuses("causal lm", "`temperature` must be above 0", temperature=0.0)
    refuses("causal lm", "`dtype` is torch.int8", dtype=torch.int8)
    refuses("causal lm", "must be 8, 4 or None", bits=3)
    refuses("sequence classification", "all logits are kept: 'logits'", what="topk")
    refuses("sequence classification", "answers with no tokens", vocabulary=5)
    refuses("causal lm", "one split at a time", DatasetDict(), error=TypeError)
    refuses("causal lm", "The dataset is empty", rows_of("causal lm").select([]))
    refuses("causal lm", "has no `labels`", rows_of("causal lm").remove_columns("labels"))


def test_collators_that_draw_or_pack_are_refused(tmp_path):
    _, teacher = pair("causal lm")

    def drawing(rows):
        batch = default_data_collator(rows)
        return {**batch, "input_ids": torch.randint_like(batch["input_ids"], 5, 90)}

    def packing(rows):
        return {name: value[None] for name, value in default_data_collator(rows).items()}

    rows = rows_of("causal lm")
    with pytest.raises(ValueError, match=r"other inputs or labels each time.*dataset.map"):
        precompute_teacher(rows, teacher, data_collator=drawing, folder=tmp_path)
    with pytest.raises(ValueError, match=r"made 1 rows out of 8.*Pack in the dataset"):
        precompute_teacher(rows, teacher, data_collator=packing, folder=tmp_path)
