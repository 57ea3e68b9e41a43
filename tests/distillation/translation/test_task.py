from types import SimpleNamespace

import pytest
import torch
from distillation.translation.pairs import OURS, THEIRS, model, pad, rows

from hf_compress.distillation.divergences import Divergence
from hf_compress.distillation.translation.collator import TRANSLATED, TranslatingCollator
from hf_compress.distillation.translation.pieces import Pieces
from hf_compress.distillation.translation.task import TranslatedCausalLM

STUDENT, TEACHER = model(OURS), model(THEIRS, seed=1)
COLLATE = TranslatingCollator(pad, Pieces(OURS, "ours"), Pieces(THEIRS, "theirs"), 128)
DIVERGENCE = Divergence(temperature=2.0, teacher_temperature=1.5)


def batch_of(count=6):
    return COLLATE([rows(count)[i] for i in range(count)])


def outputs(batch):
    translated = batch[TRANSLATED]
    with torch.no_grad():
        ours = STUDENT(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        theirs = TEACHER(
            input_ids=translated["input_ids"], attention_mask=translated["attention_mask"]
        ).logits
    return SimpleNamespace(logits=ours.requires_grad_()), SimpleNamespace(logits=theirs)


def sums(across, batch, student, teacher, **options):
    return TranslatedCausalLM(across).sums(student, [teacher], batch, divergence=DIVERGENCE, **options)


def naive(across, batch, student, teacher):
    """Row by row and span by span, as the docstring says."""
    translated, total = batch[TRANSLATED], 0.0
    for row in range(len(batch["input_ids"])):
        for span in range(int(translated["our_spans"][row].max()) + 1):
            ours = (translated["our_spans"][row] == span).nonzero()[:, 0].tolist()
            theirs = (translated["spans"][row] == span).nonzero()[:, 0].tolist()
            labels = batch["labels"][row, ours]
            if 0 in ours or 0 in theirs or (labels == -100).any():
                continue
            if across == "uld":
                p, q = (
                    (logits[row, at[0] - 1] / t).softmax(-1).sort(descending=True).values
                    for logits, at, t in ((student, ours, 2.0), (teacher, theirs, 1.5))
                )
                length = max(len(p), len(q))
                p, q = (torch.cat([x, x.new_zeros(length - len(x))]) for x in (p, q))
                total += len(ours) * 2.0 * (p - q).abs().sum()
                continue
            p, q = 1.0, 1.0
            for at in ours:
                p = p * (student[row, at - 1] / 2.0).softmax(-1)[batch["input_ids"][row, at]]
            for at in theirs:
                q = q * (teacher[row, at - 1] / 1.5).softmax(-1)[translated["input_ids"][row, at]]
            total += len(ours) * 4.0 * (q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log())
    return total


@pytest.mark.parametrize("across", ["likelihood", "uld"])
def test_it_is_what_it_says(across):
    batch = batch_of()
    student, teacher = outputs(batch)
    found = sums(across, batch, student, teacher)
    expected = naive(across, batch, student.logits.double(), teacher.logits.double())
    assert found.distillation.item() == pytest.approx(expected.item(), rel=1e-4)
    assert found.items == (batch["labels"][:, 1:] != -100).sum()
    ours = torch.autograd.grad(found.distillation, student.logits)[0]
    theirs = torch.autograd.grad(expected, student.logits)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("across", ["likelihood", "uld"])
def test_what_does_not_count_can_be_anything(across):
    batch = batch_of()
    student, teacher = outputs(batch)
    expected = sums(across, batch, student, teacher)
    unlabelled = torch.cat([batch["labels"][:, 1:] == -100, torch.ones(6, 1, dtype=torch.bool)], dim=1)
    student.logits = student.logits.detach().masked_fill(unlabelled[..., None], float("nan"))
    student.logits.requires_grad_()
    beyond = batch[TRANSLATED]["attention_mask"] == 0
    teacher.logits = teacher.logits.masked_fill(beyond[..., None], float("nan"))
    found = sums(across, batch, student, teacher)
    assert found.distillation.item() == expected.distillation.item()
    assert found.task.item() == expected.task.item()
    gradient = torch.autograd.grad(found.distillation + found.task, student.logits)[0]
    assert torch.isfinite(gradient).all()
    assert not gradient[unlabelled].any()


@pytest.mark.parametrize("across", ["likelihood", "uld"])
def test_rows_can_be_left_out(across):
    batch = batch_of()
    student, teacher = outputs(batch)
    first, rest = (
        {**{k: v[part] for k, v in batch.items() if k != TRANSLATED}, TRANSLATED: cut}
        for part in (slice(0, 2), slice(2, None))
        for cut in [{name: value[part] for name, value in batch[TRANSLATED].items()}]
    )
    whole = sums(across, batch, student, teacher)
    ours = [SimpleNamespace(logits=student.logits[part]) for part in (slice(0, 2), slice(2, None))]
    theirs = [SimpleNamespace(logits=teacher.logits[part]) for part in (slice(0, 2), slice(2, None))]
    apart = [sums(across, b, s, t) for b, s, t in zip((first, rest), ours, theirs, strict=True)]
    two = sums(across, batch, student, teacher, rows=2)
    assert two.distillation.item() == pytest.approx(apart[0].distillation.item())
    both = sum(each.distillation for each in apart)
    assert both.item() == pytest.approx(whole.distillation.item(), rel=1e-5)


@pytest.mark.parametrize("across", ["likelihood", "uld"])
def test_without_a_label_all_is_0_and_in_the_graph(across):
    batch = batch_of()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    student, teacher = outputs(batch)
    found = sums(across, batch, student, teacher)
    assert found.items == found.task == found.distillation == 0
    gradient = torch.autograd.grad(found.distillation + found.task, student.logits)[0]
    assert not gradient.any()


@pytest.mark.parametrize("across", ["likelihood", "uld"])
def test_a_teacher_that_is_the_student_teaches_nothing(across):
    pieces = Pieces(OURS, "ours")
    batch = TranslatingCollator(pad, pieces, pieces, None)([rows(4)[i] for i in range(4)])
    student, _ = outputs(batch | {TRANSLATED: batch_of(4)[TRANSLATED]})
    found = TranslatedCausalLM(across).sums(student, [student], batch, divergence=Divergence())
    assert found.distillation.item() == pytest.approx(0, abs=1e-5)
