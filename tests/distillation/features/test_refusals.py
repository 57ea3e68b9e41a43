"""Matches that cannot be right are told so: when they are written, when the trainer is built, or in the
first step, before any weight has moved."""

import pytest
import torch
from distillation.features.pairs import make, match_loss
from tiny import classification_rows, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5, tiny_vit

from hf_compress import DistillationArguments, DistillationTrainer
from hf_compress.distillation.features.match import Match
from hf_compress.distillation.features.matching import FeatureMatching
from hf_compress.distillation.features.presets import PRESETS, as_matches

NAN = float("nan")


@pytest.mark.parametrize(
    ("what", "settings", "message"),
    [
        ("hidden", {"weight": -1.0}, "`weight` is -1.0: pass a number >= 0"),
        ("hidden", {"weight": NAN}, "`weight` is nan"),
        ("hidden", {"weight": True}, "`weight` is True"),
        ("hidden", {"distance": "kl"}, "`distance` is 'kl': for 'hidden' it is one of mse, cosine"),
        ("attention", {"distance": "cosine"}, "for 'attention' it is one of kl, mse"),
        ("values", {"distance": "mse"}, "for 'values' it is one of kl"),
        ("hidden", {"layers": "first"}, "`layers` is 'first': pass one of uniform, skip"),
        ("embeddings", {"layers": "final"}, "but 'embeddings' is not of a layer"),
        ("attention", {"layers": "closest"}, "closest layers are found by hidden states"),
        ("hidden", {"tokens": "some"}, "`tokens` is 'some': pass one of all, first"),
        ("attention", {"tokens": "first"}, "attention and relations are of all tokens"),
        ("queries", {"relation_heads": 0}, "`relation_heads` is 0: it is a number, 1 or more"),
        ("attention", {"relation_heads": 4}, "`relation_heads` is 4.*here of 'attention'"),
        ("values", {"projection": True}, "'values' needs no projection"),
        (
            "hidden",
            {"projection": True, "learning_rate": 0.0},
            "`learning_rate` is 0.0: pass a number > 0",
        ),
        ("hidden", {"learning_rate": 0.1}, "pass projection=True too"),
        ("hidden", {"teacher_module": "bert"}, "goes with the name of a module, not with"),
    ],
)
def test_settings(what, settings, message):
    with pytest.raises(ValueError, match=message):
        Match(what, **settings)


def test_presets_that_there_are_not():
    with pytest.raises(ValueError, match="no preset 'tinybret'; there are distilbert, tinybert"):
        as_matches("tinybret")
    with pytest.raises(TypeError, match="`matches` holds a str: pass Match"):
        as_matches(["tinybert"])
    assert as_matches(Match("hidden")) == as_matches([Match("hidden")])


BERT = tiny_bert()
# name: (student, teacher, match, message)
PAIRS = {
    "other widths": (
        tiny_bert(hidden=16),
        BERT,
        Match("hidden"),
        "the student's vectors have width 16, the teacher's 32. Pass projection=True",
    ),
    "more layers than the teacher": (
        tiny_bert(layers=3),
        BERT,
        Match("hidden"),
        "student has 3 layers and the teacher only 2",
    ),
    "a layer that there is not": (
        BERT,
        BERT,
        Match("hidden", layers=[(0, 2)]),
        "but the teacher has 2 layers: 0 to 1",
    ),
    "a module that there is not": (
        BERT,
        BERT,
        Match("bert.poler"),
        "student has no module 'bert.poler'; near names: bert.pooler",
    ),
    "a kind that there is not": (BERT, BERT, Match("hiden"), "near names: hidden"),
    "a module that the teacher has not": (
        BERT,
        tiny_llama(),
        Match("bert.pooler"),
        "the teacher has no module 'bert.pooler'",
    ),
    "no pooler": (tiny_vit(), tiny_vit(), Match("pooled"), "ViTForImageClassification has no pooler"),
    "a stack that there is not": (
        BERT,
        BERT,
        Match("hidden", stack="decoder"),
        "no stack 'decoder' in BertForSequenceClassification, only layers",
    ),
    "models of different build": (
        BERT,
        tiny_t5(),
        Match("hidden"),
        "student has layers, the teacher encoder, decoder",
    ),
    "the first token of a causal model": (
        tiny_gpt2(),
        tiny_gpt2(),
        Match("hidden", tokens="first"),
        "first token of transformer.h sees only itself",
    ),
}


@pytest.mark.parametrize("case", PAIRS)
def test_pairs_of_models(case):
    student, teacher, match, message = PAIRS[case]
    with pytest.raises(ValueError, match=message):
        FeatureMatching(student, teacher, [match], device=torch.device("cpu"))


def test_two_matches_of_one_name():
    with pytest.raises(
        ValueError, match="several matches are called 'hidden': give them a `name` each"
    ):
        FeatureMatching(BERT, BERT, [Match("hidden"), Match("hidden")], device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("match", "message"),
    [
        (Match("attention"), "the student has 2 heads of attention, the teacher 4"),
        (Match("values"), "student has 2 heads of values.*`relation_heads`"),
        (Match("values", relation_heads=3), "3, which does not divide the width 16 of the values"),
        (Match("classifier"), r"student gives shape \(3, 3\).*pass tokens=None"),
        (
            Match("bert.encoder.layer.0.intermediate"),
            "width 32, the teacher's 64. Pass projection",
        ),
    ],
)
def test_features_that_do_not_fit(match, message):
    _, teacher, batch = make("bert")
    student = tiny_bert(hidden=16)
    for layer in student.bert.encoder.layer:
        layer.attention.self.attention_head_size = 8  # two heads as large as the teacher's four
    with pytest.raises(ValueError, match=message):
        match_loss(student, teacher, batch, [match])


def test_a_mask_of_other_positions():
    student, teacher, batch = make("vit")
    batch["attention_mask"] = torch.ones(3, 7)
    student.forward = lambda **inputs: type(student).forward(student, inputs["pixel_values"])
    teacher.forward = lambda **inputs: type(teacher).forward(teacher, inputs["pixel_values"])
    with pytest.raises(
        ValueError, match=r"the mask of tokens has \(3, 7\). Expected is \(rows, positions"
    ):
        match_loss(student, teacher, batch, [Match("hidden")])


def test_the_first_step_is_refused_before_any_weight_moves(tmp_path):
    student, teacher = tiny_bert(hidden=16), tiny_bert(seed=1)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    trainer = DistillationTrainer(
        student,
        DistillationArguments(str(tmp_path), use_cpu=True, max_steps=1, disable_tqdm=True),
        train_dataset=classification_rows(rows=8),
        teacher=teacher,
        matches=PRESETS["minilmv2"],
    )
    with pytest.raises(ValueError, match="`relation_heads` is 12, which does not divide"):
        trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
