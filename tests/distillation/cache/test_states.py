"""What happened inside the teacher, kept for matches."""

import pytest
import torch
from distillation import heads
from distillation.cache.pairs import rows_of, trainer_of
from tiny import (
    classification_rows,
    image_rows,
    language_rows,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_t5,
    tiny_vit,
)

from hf_compress import DistillationArguments, DistillationTrainer
from hf_compress.distillation.cache.cells import OUTPUTS, STATES, from_bytes
from hf_compress.distillation.cache.precompute import precompute_teacher
from hf_compress.distillation.features.match import Match

PROJECTED = {"projection": True, "learning_rate": 0.1}
SPREAD = {"initializer_range": 0.3}


def translations():
    return heads.make_rows("t5", 12)


# name: student, teacher, rows, what is kept of the teacher, matches
CASES = {
    "bert hidden": (
        lambda: tiny_bert(**SPREAD),
        lambda: tiny_bert(seed=1, layers=4, **SPREAD),
        lambda: classification_rows(12),
        {"what": "hidden", "layers": [1, 3]},
        [
            Match("hidden", weight=2.0),
            Match("hidden", layers="final", tokens="first", distance="cosine", name="first"),
            Match("hidden", layers="final", tokens="mean", name="mean"),
        ],
    ),
    "bert pooled": (
        lambda: tiny_bert(**SPREAD),
        lambda: tiny_bert(seed=1, layers=4, **SPREAD),
        lambda: classification_rows(12),
        {"what": "pooled"},
        [Match("pooled")],
    ),
    "llama of another width, by a preset": (
        lambda: tiny_llama(**SPREAD),
        lambda: tiny_llama(seed=1, hidden=48, layers=3, **SPREAD),
        lambda: language_rows(12),
        {"what": "hidden", "layers": [-1]},
        "distilbert",
    ),
    "gpt2 closest": (
        tiny_gpt2,
        lambda: tiny_gpt2(seed=1, layers=4),
        lambda: language_rows(12),
        {"what": "hidden", "layers": [1, 3]},
        [Match("hidden", layers="closest")],
    ),
    "vit, without a mask": (
        tiny_vit,
        lambda: tiny_vit(seed=1),
        lambda: image_rows(12),
        {"what": "hidden", "layers": [0, 1]},
        [Match("hidden")],
    ),
    "t5, encoder and decoder": (
        tiny_t5,
        lambda: tiny_t5(seed=1, layers=4),
        translations,
        {"what": "hidden", "layers": [1, 3]},
        [Match("hidden", distance="relative")],
    ),
    "choices": (
        lambda: heads.make_model("multiple choice"),
        lambda: heads.make_model("multiple choice", seed=1),
        lambda: heads.make_rows("multiple choice", 12),
        {"what": "hidden", "layers": [0]},
        [Match("hidden"), Match("hidden", tokens="mean", name="mean")],
    ),
}


def kept(case, folder, **settings):
    _, make_teacher, make_rows, states, _ = CASES[case]
    teacher = make_teacher().eval()
    rows = precompute_teacher(make_rows(), teacher, what="logits", folder=folder, batch_size=5)
    return precompute_teacher(rows, teacher, folder=folder, batch_size=5, **{**states, **settings})


def trained(student, teacher, rows, matches, folder):
    trainer = DistillationTrainer(
        student,
        DistillationArguments(
            str(folder),
            per_device_train_batch_size=4,
            per_device_eval_batch_size=4,
            num_train_epochs=2,
            learning_rate=1e-2,
            logging_steps=1,
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            report_to="none",
            optim="sgd",
        ),
        teacher=teacher,
        train_dataset=rows,
        eval_dataset=rows,
        matches=matches,
    )
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    names = sorted(name for name in logs[0] if "loss" in name or name == "grad_norm")
    return names, torch.tensor([[log[name] for name in names] for log in logs])


@pytest.mark.parametrize("case", CASES)
def test_matches_of_what_was_kept_train_as_those_of_the_teacher(case, tmp_path):
    make_student, make_teacher, make_rows, _, matches = CASES[case]
    names, online = trained(make_student(), make_teacher(), make_rows(), matches, tmp_path)
    ours_names, ours = trained(make_student(), "cached", kept(case, tmp_path), matches, tmp_path)
    assert ours_names == names
    assert any(name not in ("loss", "loss_task", "loss_kd", "grad_norm") for name in names)
    torch.testing.assert_close(ours, online, rtol=1e-4, atol=1e-5)


def test_states_are_those_of_the_tokens_alone(tmp_path):
    teacher, rows = tiny_llama(seed=1, layers=3).eval(), language_rows(6)
    rows = precompute_teacher(rows, teacher, what="hidden", layers=[0, -1], folder=tmp_path)
    for row in rows:
        length = sum(row["attention_mask"])
        with torch.no_grad():
            states = teacher(
                torch.tensor([row["input_ids"][:length]]), output_hidden_states=True
            ).hidden_states
        found = from_bytes(row[STATES]).answers
        assert found.keys() == {"hidden/layers/0", "hidden/layers/2"}
        torch.testing.assert_close(found["hidden/layers/0"], states[1][0])
        torch.testing.assert_close(found["hidden/layers/2"], states[-1][0])


def test_in_halves_they_take_half(tmp_path):
    whole = kept("bert hidden", tmp_path)
    half = kept("bert hidden", tmp_path, dtype=torch.bfloat16)
    ours, theirs = (from_bytes(rows[0][STATES]).answers for rows in (half, whole))
    assert all(value.dtype == torch.bfloat16 for value in ours.values())
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name].float(), value, rtol=1e-2, atol=1e-2)
    student = CASES["bert hidden"][0]()
    trained(student, "cached", half, [Match("hidden")], tmp_path)


def test_without_matches_states_are_left_where_they_are(tmp_path):
    rows = kept("bert pooled", tmp_path)
    trainer = trainer_of(CASES["bert pooled"][0](), "cached", rows, tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    assert OUTPUTS in batch
    assert STATES not in batch
    trainer.train()


def test_evaluation_needs_no_states(tmp_path):
    rows = kept("bert pooled", tmp_path)
    trainer = DistillationTrainer(
        CASES["bert pooled"][0](),
        DistillationArguments(str(tmp_path), use_cpu=True, report_to="none"),
        teacher="cached",
        train_dataset=rows,
        eval_dataset=rows.remove_columns(STATES),
        matches=[Match("pooled")],
    )
    assert trainer.evaluate()["eval_loss_kd"] > 0


def refused(rows, match, tmp_path, matches):
    with pytest.raises(ValueError, match=match):
        trained(CASES["bert hidden"][0](), "cached", rows, matches, tmp_path)


def test_what_was_not_kept_is_refused(tmp_path):
    rows = kept("bert hidden", tmp_path)
    refused(rows, r"compare attention/layers/\d, .*only hidden/layers/1, hid", tmp_path, "mobilebert")
    final = [Match("hidden", layers=[(0, 0)])]
    refused(rows, r"compare hidden/layers/0 .*what='hidden', layers=", tmp_path, final)
    refused(rows, r"compare module/bert.pooler/0", tmp_path, [Match("pooled")])
    refused(
        rows.remove_columns(STATES), r"with what='hidden' or 'pooled' adds", tmp_path, [Match("hidden")]
    )


def test_states_of_another_teacher_than_the_outputs_are_refused(tmp_path):
    rows = kept("bert hidden", tmp_path)
    other = tiny_bert(seed=2, layers=4).eval()
    rows = precompute_teacher(rows, other, what="hidden", layers=[1, 3], folder=tmp_path)
    refused(rows, "kept of different teachers", tmp_path, [Match("hidden")])


def test_settings_that_do_not_fit_are_refused(tmp_path):
    def refuses(match, teacher=None, **settings):
        teacher = teacher or tiny_bert(seed=1)
        with pytest.raises(ValueError, match=match):
            precompute_teacher(classification_rows(4), teacher, folder=tmp_path, **settings)

    refuses("has 2 layers: 0 to 1, or -1 to -2", what="hidden", layers=[2])
    refuses("of no layer", what="pooled", layers=[0])
    refuses("goes with what='hidden'", what="logits", layers=[0])
    refuses("goes with what='topk'", what="hidden", size=3)
    with pytest.raises(ValueError, match="has no pooler"):
        precompute_teacher(rows_of("causal lm"), tiny_llama(), what="pooled", folder=tmp_path)
