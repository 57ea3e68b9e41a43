"""The pruned tokenizer: the texts keep their tokens, and any other text has some."""

import json

import pytest
import torch
from tokenizers import (
    Tokenizer,
    models,
    pre_tokenizers,
)
from transformers import (
    AutoTokenizer,
    GPT2Tokenizer,
    LlamaTokenizer,
    T5Tokenizer,
)
from vocabularies import (
    BUILDERS,
    SPECIAL,
    bert_of,
    bytes_of_gpt2,
    bytes_of_llama3,
    kept,
    pieces_of_llama2,
    random_texts,
    unigram,
    wordpiece,
    words_of_clip,
    wrapped,
)

from hf_compress.pruning.vocabulary.prune import prune_vocabulary


@pytest.fixture(scope="module", params=BUILDERS, ids=lambda build: build.__name__)
def tokenizer(request):
    return request.param()


def test_the_texts_give_the_same_tokens_and_any_other_gives_some(tokenizer, tmp_path):
    model = bert_of(tokenizer)
    for seed in range(8):
        texts = random_texts(3 + 5 * seed, seed)
        _, smaller = prune_vocabulary(model, tokenizer, texts)
        assert type(smaller) is type(tokenizer)
        assert len(smaller) < len(tokenizer)
        old = kept(tokenizer, smaller)
        assert torch.equal(old, old.unique())  # all different, in their old order
        for text in texts:
            assert smaller.tokenize(text) == tokenizer.tokenize(text), text
            assert old[smaller(text)["input_ids"]].tolist() == tokenizer(text)["input_ids"]
        for text in random_texts(20, seed + 100):
            assert all(0 <= i < len(smaller) for i in smaller(text)["input_ids"])
    smaller.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for text in texts + random_texts(20, 500):
        assert again(text)["input_ids"] == smaller(text)["input_ids"]


@pytest.mark.parametrize("build", [bytes_of_gpt2, bytes_of_llama3, pieces_of_llama2])
def test_bytes_spell_what_no_text_held(build):
    before = build()
    _, after = prune_vocabulary(bert_of(before), before, ["oil"])
    assert len(after) < 300
    for text in ["wheat and 日本語 🙂", "\x00", "oil"]:
        ids = after(text, add_special_tokens=False)["input_ids"]
        assert after.unk_token_id not in ids
        assert after.decode(ids) == text


@pytest.mark.parametrize("build", [wordpiece, unigram, words_of_clip])
def test_new_words_of_old_characters_are_spelt(build):
    before = build()
    _, after = prune_vocabulary(bert_of(before), before, ["a profit of shares", "oil prices"])
    ids = after("spore pail", add_special_tokens=False)["input_ids"]
    assert after.unk_token_id not in ids
    assert len(ids) > len(before("spore pail", add_special_tokens=False)["input_ids"])


def test_an_unknown_word_does_not_become_known():
    # "abcde" begins with "abc", and "##de" is unknown. Without "abc" it would be "ab" and "##cde".
    vocabulary = ["<pad>", "<s>", "</s>", "<unk>", "<mask>", "abc", "ab", "##cde", "a", "##c"]
    tokenizer = Tokenizer(models.WordPiece({t: i for i, t in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    before = wrapped(tokenizer)
    texts = ["abcde", "ab abcde", "acde"]
    assert before.tokenize("abcde") == ["<unk>"]
    _, after = prune_vocabulary(bert_of(before), before, texts)
    assert [after.tokenize(text) for text in texts] == [before.tokenize(text) for text in texts]


def test_unigram_keeps_the_score_that_unknown_ones_are_measured_by():
    # "é" alone is unknown, at ten below the lowest score: -30. The path over "caf" and it costs
    # -1 - 30, which is dearer than "ca" and "fé" at -28; with a lowest score of -14 it would cost -25.
    pieces = [("<unk>", 0.0), ("caf", -1.0), ("ca", -14.0), ("fé", -14.0), ("z", -20.0)]
    before = wrapped(Tokenizer(models.Unigram([*pieces, *((name, 0.0) for name in SPECIAL[:3])], 0)))
    assert before.tokenize("café") == ["ca", "fé"]
    _, after = prune_vocabulary(bert_of(before), before, ["café", "caf"])
    assert after.tokenize("café") == ["ca", "fé"]


def model_of(tokenizer):
    return json.loads(tokenizer.backend_tokenizer.to_str())["model"]


def gpt2_class():
    model = model_of(bytes_of_gpt2())
    return GPT2Tokenizer(model["vocab"], [tuple(pair) for pair in model["merges"]], unk_token="</s>")


def llama_class():
    model = model_of(pieces_of_llama2())
    return LlamaTokenizer(model["vocab"], [tuple(pair) for pair in model["merges"]])


def t5_class():
    pieces = [tuple(piece) for piece in model_of(unigram())["vocab"] if piece[0] not in SPECIAL]
    ids = [(f"<extra_id_{i}>", 0.0) for i in reversed(range(100))]
    return T5Tokenizer([("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *pieces, *ids])


@pytest.mark.parametrize("build", [gpt2_class, llama_class, t5_class])
def test_classes_that_build_their_tokenizer_themselves(build, tmp_path):
    before = build()
    texts = random_texts(30, 0)
    _, after = prune_vocabulary(bert_of(before), before, texts)
    assert type(after) is type(before)
    assert len(after) < len(before)
    after.save_pretrained(tmp_path)
    again = type(before).from_pretrained(tmp_path)
    for text in texts:
        assert before.tokenize(text) == after.tokenize(text) == again.tokenize(text)
        assert after.convert_ids_to_tokens(after(text)["input_ids"]) == before.convert_ids_to_tokens(
            before(text)["input_ids"]
        )


def test_a_class_that_does_not_take_its_file_as_it_is_is_refused():
    # T5Tokenizer says that the third token is the unknown one. Here that is </s>, and it moves up.
    pieces = [
        ("<pad>", 0.0),
        ("x", -3.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        ("\u2581oil", -1.0),
        ("z", -9.0),
    ]
    before = T5Tokenizer(pieces, extra_ids=0)
    with pytest.raises(ValueError, match="PreTrainedTokenizerFast"):
        prune_vocabulary(bert_of(before), before, ["oil"])
