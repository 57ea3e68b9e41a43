import pytest

from hf_compress.samples import corpus, minilm


@pytest.mark.parametrize(
    ("name", "train", "test", "classes"),
    [("reuters-r8", 5485, 2189, 8), ("reuters-r52", 6532, 2568, 52), ("20newsgroups", 11293, 7528, 20)],
)
def test_standard_splits(name, train, test, classes):
    data = corpus(name)
    assert (len(data["train"]), len(data["test"])) == (train, test)
    assert len(data["train"].features["label"].names) == classes
    assert all(text.strip() for text in data["test"]["text"][:100])


def test_unknown_corpus():
    with pytest.raises(ValueError, match="reuters-r8"):
        corpus("reuters")


def test_the_model_is_the_one_it_says():
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(minilm())
    assert (config.model_type, config.num_hidden_layers, config.hidden_size) == ("bert", 6, 384)
