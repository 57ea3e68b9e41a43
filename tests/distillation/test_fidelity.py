"""The full teacher beside itself in fewer bits, and beside its kept answers."""

import copy

import pytest
import torch
import torch.nn.functional as F
from distillation.cache.pairs import CASES, pair, rows_of, trainer_of
from tiny import VOCABULARY, classification_rows, language_rows, tiny_bert, tiny_llama

from hf_compress import DistillationArguments, DistillationTrainer
from hf_compress.distillation.cache.precompute import precompute_teacher
from hf_compress.distillation.fidelity import Comparison, Fidelity, compare_teachers
from hf_compress.distillation.tasks.heads import head_of
from hf_compress.distillation.teacher import load_teacher


def spread_llama():
    return tiny_llama(hidden=64, seed=1, initializer_range=0.3).eval()


def by_name(comparison):
    return {way.name: way for way in comparison.ways}


def test_kl_agreement_and_memory_of_8_and_4_bit():
    """Against the logits of both models, by hand."""
    pytest.importorskip("bitsandbytes")
    teacher, rows = spread_llama(), language_rows(10)
    comparison = compare_teachers(teacher, rows, rows=10, batch_size=10, temperature=2.0)
    ids, mask, labels = (torch.tensor(rows[name]) for name in ("input_ids", "attention_mask", "labels"))
    counts = labels[:, 1:] != -100
    assert (comparison.rows, comparison.items) == (10, counts.sum())
    assert [way.bits for way in comparison.ways] == [None, 8, 4]

    def logits(model):
        with torch.no_grad():
            return model(input_ids=ids, attention_mask=mask).logits[:, :-1][counts]

    full = logits(teacher)
    for way in comparison.ways[1:]:
        quantized = load_teacher(teacher, head_of(teacher), bits=way.bits, device=torch.device("cpu"))
        ours = logits(quantized)
        expected = F.kl_div(
            F.log_softmax(full / 2, -1),
            F.log_softmax(ours / 2, -1),
            log_target=True,
            reduction="none",
        )
        assert way.kl == pytest.approx(expected.sum(-1).mean().item(), rel=1e-3)
        same = (ours.argmax(-1) == full.argmax(-1)).float().mean().item()
        assert way.agreement == pytest.approx(same)
        assert way.memory == sum(parameter.nbytes for parameter in quantized.parameters())
    ways = by_name(comparison)
    assert (ways["full"].kl, ways["full"].agreement) == (0.0, 1.0)
    assert ways["full"].memory == sum(parameter.nbytes for parameter in teacher.parameters())
    assert 0 < ways["8 bit"].kl < ways["4 bit"].kl
    assert ways["4 bit"].memory < ways["8 bit"].memory < ways["full"].memory


@pytest.mark.parametrize("case", CASES)
def test_of_every_head_a_teacher_is_as_itself(case):
    _, teacher = pair(case)
    teacher.train()
    comparison = compare_teachers(teacher, rows_of(case), bits=(), batch_size=12)
    (way,) = comparison.ways
    assert way.kl == 0.0
    assert way.agreement == 1.0
    assert comparison.items > 0
    assert teacher.training


def test_of_a_regression_it_is_the_squared_error():
    pytest.importorskip("bitsandbytes")
    teacher = tiny_bert(num_labels=1, hidden=64, initializer_range=0.3).eval()
    rows = classification_rows(8).map(lambda row: {"labels": float(row["labels"])})
    comparison = compare_teachers(teacher, rows, bits=(8,), temperature=2.0)
    ids, mask = (torch.tensor(rows[name]) for name in ("input_ids", "attention_mask"))
    quantized = load_teacher(teacher, head_of(teacher), bits=8, device=torch.device("cpu"))
    with torch.no_grad():
        ours, full = (model(ids, attention_mask=mask).logits for model in (quantized, teacher))
    assert comparison.ways[1].kl == pytest.approx((ours - full).square().mean().item(), rel=1e-3)
    assert comparison.ways[1].agreement is None


@pytest.mark.parametrize("what", ["logits", "topk", "sampled"])
def test_kept_answers_are_compared_too(what, tmp_path):
    teacher = spread_llama()
    rows = precompute_teacher(language_rows(10), teacher, what=what, folder=tmp_path)
    way = by_name(compare_teachers(teacher, rows, bits=()))[f"cached {what}"]
    assert abs(way.kl) < 1e-3
    assert way.agreement > 0.999
    assert way.memory == 0
    known = {"logits": 1.0, "sampled": None}
    if what in known:
        assert way.known == known[what]
    else:
        whole = compare_teachers(teacher, rows, bits=())
        assert whole.temperature == 2.0
        assert 22 / VOCABULARY < way.known < 1


def test_answers_of_another_teacher_are_far_from_this_one(tmp_path):
    other = tiny_llama(hidden=64, seed=2, initializer_range=0.3).eval()
    rows = precompute_teacher(language_rows(10), other, what="logits", folder=tmp_path)
    way = by_name(compare_teachers(spread_llama(), rows, bits=()))["cached logits"]
    assert way.kl > 0.1
    assert way.agreement < 0.9
    longer = rows.map(lambda row: {"input_ids": row["input_ids"][::-1]})
    with pytest.raises(ValueError, match="not what the teacher was asked about"):
        compare_teachers(other, longer, bits=())


def test_a_path_and_its_table(tmp_path):
    pytest.importorskip("bitsandbytes")
    spread_llama().save_pretrained(tmp_path)
    comparison = compare_teachers(str(tmp_path), language_rows(6), bits=(4,))
    lines = str(comparison).splitlines()
    assert lines[0].split() == ["teacher", "KL", "agreement", "known", "memory"]
    assert lines[1].startswith("full")
    assert "100.00%" in lines[1]
    assert lines[2].startswith("4 bit")
    assert "items of 6 rows, at temperature 1" in lines[3]


def way(name, kl, memory, bits=None):
    return Fidelity(name=name, bits=bits, kl=kl, agreement=1.0, memory=memory)


def test_the_cheapest_within_the_limit():
    comparison = Comparison(
        ways=(way("full", 0.0, 100), way("8 bit", 0.01, 50, 8), way("4 bit", 0.1, 30, 4)),
        rows=1,
        items=1,
        temperature=1.0,
    )
    assert [comparison.cheapest(limit).bits for limit in (0.0, 0.01, 0.1)] == [None, 8, 4]
    for limit in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="a number >= 0"):
            comparison.cheapest(limit)


def test_rows_without_labels_that_count_are_refused():
    rows = language_rows(4).map(lambda row: {"labels": [-100] * len(row["labels"])})
    with pytest.raises(ValueError, match="no label that counts"):
        compare_teachers(spread_llama(), rows, bits=())


def auto(teacher, tmp_path, **settings):
    return DistillationTrainer(
        tiny_llama(hidden=64),
        DistillationArguments(str(tmp_path), use_cpu=True, report_to="none"),
        teacher=teacher,
        train_dataset=language_rows(70),
        **settings,
    )


def test_a_trainer_takes_the_cheapest_within_its_limit(tmp_path):
    pytest.importorskip("bitsandbytes")
    teacher = spread_llama()
    before = copy.deepcopy(teacher.state_dict())
    comparison = auto(teacher, tmp_path, teacher_bits="auto").teacher_comparison
    assert (comparison.rows, comparison.temperature) == (64, 2.0)
    ways = by_name(comparison)
    for limit, bits in ((10.0, 4), (ways["8 bit"].kl, 8), (0.0, None)):
        trainer = auto(teacher, tmp_path, teacher_bits="auto", teacher_max_kl=limit)
        loaded = {4: "is_loaded_in_4bit", 8: "is_loaded_in_8bit"}
        chosen = [each for each, flag in loaded.items() if getattr(trainer.teacher, flag, False)]
        assert chosen == ([] if bits is None else [bits])
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_what_auto_cannot_choose_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"compares the precisions of one teacher"):
        auto([spread_llama(), spread_llama()], tmp_path, teacher_bits="auto")
    with pytest.raises(ValueError, match=r"goes with teacher_bits='auto'"):
        auto(spread_llama(), tmp_path, teacher_bits=8, teacher_max_kl=0.1)
    rows = precompute_teacher(language_rows(8), spread_llama(), folder=tmp_path)
    student = tiny_llama(hidden=64)
    with pytest.raises(ValueError, match=r"must stand alone"):
        trainer_of(student, ["cached", spread_llama()], rows, tmp_path)
    with pytest.raises(ValueError, match=r"leave out `teacher_bits` \(8\)"):
        DistillationTrainer(
            student,
            DistillationArguments(str(tmp_path), use_cpu=True),
            teacher="cached",
            teacher_bits=8,
            train_dataset=rows,
        )
