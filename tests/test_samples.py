import pytest

from hf_compress.samples import corpus, minilm, packaged_model


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


def test_tales_of_one_author_for_training_and_of_another_for_the_test():
    data = corpus("tales")
    assert (len(data["train"]), len(data["test"])) == (670, 89)
    assert data["test"][0]["text"].startswith("It was terribly cold and nearly dark")
    assert max(len(text.split()) for text in data["train"]["text"]) == 120


def test_digits():
    data = corpus("digits")
    assert (len(data["train"]), len(data["test"])) == (1437, 360)
    assert data["train"][0]["image"].size == (8, 8)
    assert sorted(set(data["test"]["label"])) == list(range(10))
    brightest = max(image.getextrema()[1] for image in data["test"]["image"])
    assert brightest == 255


def test_spoken_digits_of_speakers_that_only_the_test_has():
    pytest.importorskip("espeakng_loader")
    data = corpus("spoken-digits")
    assert (len(data["train"]), len(data["test"])) == (960, 320)
    assert not set(data["train"]["speaker"]) & set(data["test"]["speaker"])
    row = data["test"].with_format("numpy")[0]
    loudest = abs(row["audio"]["array"]).max()
    assert row["audio"]["sampling_rate"] == 16_000
    assert 0.05 < loudest <= 1
    lengths = [len(sound["array"]) / 16_000 for sound in data["test"]["audio"]]
    assert min(lengths) > 0.1
    assert max(lengths) < 1
    assert len({*lengths}) > 200


def test_a_packaged_model_by_its_name():
    assert packaged_model("all-minilm-l6-v2") == minilm()
    with pytest.raises(ValueError, match="smollm2-135m-instruct"):
        packaged_model("smollm")
