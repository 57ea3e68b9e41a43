"""Each preset against its paper, written naively."""

import copy
from dataclasses import replace

import pytest
import torch
from distillation.features import naive
from distillation.features.pairs import make, match_loss, text_batch
from tiny import tiny_bert

from hf_compress.distillation.features.match import Match
from hf_compress.distillation.features.presets import PRESETS

ALL = ("bert", "gpt2", "llama", "vit")
PAPERS = {
    "distilbert": (naive.distilbert, ALL),
    # Llama's scores are of rotated queries and keys, which its matrices do not give.
    "tinybert": (naive.tinybert, ("bert", "gpt2", "vit")),
    "pkd": (naive.pkd, ("bert", "vit")),
    "minilm": (naive.minilm, ALL),
    "mobilebert": (naive.mobilebert, ALL),
    "squarehead": (naive.squarehead, ALL),
}
CASES = [(preset, model) for preset, (_, models) in PAPERS.items() for model in models]


@pytest.mark.parametrize(("preset", "model"), CASES)
def test_preset(preset, model):
    student, teacher, batch = make(model)
    ours = match_loss(student, teacher, batch, PRESETS[preset])
    torch.testing.assert_close(ours, PAPERS[preset][0](student, teacher, batch), rtol=1e-4, atol=1e-6)
    assert ours > 1e-3


@pytest.mark.parametrize("heads", [4, 8, None])
@pytest.mark.parametrize("model", ["bert", "gpt2", "vit"])
def test_minilmv2(model, heads):
    student, teacher, batch = make(model)
    matches = [replace(match, relation_heads=heads) for match in PRESETS["minilmv2"]]
    ours = match_loss(student, teacher, batch, matches)
    expected = naive.minilmv2(student, teacher, batch, heads)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)
    assert ours > 1e-3


def test_minilmv2_between_other_widths_and_numbers_of_heads():
    student, teacher = tiny_bert(hidden=16, initializer_range=0.3), tiny_bert(seed=1, layers=3)
    batch = text_batch()
    matches = [replace(match, relation_heads=2) for match in PRESETS["minilmv2"]]
    loss = match_loss(student.eval(), teacher.eval(), batch, matches)
    assert loss > 0
    assert loss.requires_grad


def test_losses_of_equal_models_are_0_and_of_others_are_not():
    student, teacher, batch = make("bert", student=2, teacher=2)
    for preset in PRESETS.values():
        matches = [
            replace(
                match,
                relation_heads=match.relation_heads and 8,
                # The same layers of both, whatever the map.
                layers="uniform" if match.what == "embeddings" else [(1, 1)],
            )
            for match in preset
        ]
        same = match_loss(copy.deepcopy(teacher), teacher, batch, matches)
        assert same.item() == pytest.approx(0, abs=1e-5)
        assert match_loss(student, teacher, batch, matches) > 1e-3


@pytest.mark.parametrize(
    "match",
    [
        Match("hidden", weight=0.7),
        Match("hidden", tokens="mean", distance="cosine"),
        Match("embeddings"),
        Match("attention", distance="kl"),
        Match("attention", distance="mse"),
        Match("queries", relation_heads=8),
        Match("values"),
    ],
    ids=str,
)
def test_gradients_by_differences(match):
    """In double precision, of one weight that everything depends on."""
    student, teacher, batch = make("bert")
    student.double(), teacher.double()
    weight = student.bert.embeddings.word_embeddings.weight
    if match.what not in ("hidden", "embeddings"):
        weight = student.bert.encoder.layer[0].attention.self.query.weight
    if match.what == "values":
        weight = student.bert.encoder.layer[0].attention.self.value.weight
    match_loss(student, teacher, batch, [match]).backward()
    place = divmod(int(weight.grad.abs().argmax()), weight.shape[1])
    values = []
    for step in (1e-5, -2e-5):
        with torch.no_grad():
            weight[place] += step
        values.append(match_loss(student, teacher, batch, [match]).item())
    assert weight.grad[place].item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5)
