import pytest
from vocabularies import bytes_of_gpt2, pieces_of_llama2, random_texts, unigram, words_of_clip

from hf_compress.distillation.translation.pieces import Pieces
from hf_compress.distillation.translation.spans import NONE, common_spans, translate


def spans(ours, theirs):
    return common_spans([each.encode() for each in ours], [each.encode() for each in theirs])


def test_a_span_ends_where_both_cut():
    assert spans(["the", " cat", " sat"], ["th", "e", " cat sat"]) == ([0, 1, 1], [0, 0, 1])
    assert spans(["ab", "cd"], ["a", "bc", "d"]) == ([0, 0], [0, 0, 0])
    assert spans(["a", "b"], ["a", "b"]) == ([0, 1], [0, 1])


def test_spaces_before_the_text_count_for_nothing():
    assert spans(["Hello", " you"], [" Hello", " you"]) == ([0, 1], [0, 1])
    assert spans([" ", " ", "a"], [" a"]) == ([0, 0, 0], [0])


def test_spans_end_where_the_texts_differ():
    assert spans(["a", "B", "c"], ["a", "b", "c"]) == ([0, NONE, NONE], [0, NONE, NONE])
    assert spans(["a", "bc"], ["a", "b"]) == ([0, NONE], [0, NONE])
    assert spans([], ["a"]) == ([], [NONE])
    assert spans(["a"], []) == ([NONE], [])


def test_a_character_of_several_tokens_is_one_span():
    euro = "€".encode()
    assert common_spans([euro[:1], euro[1:2], euro[2:]], [euro]) == ([0, 0, 0], [0])


@pytest.fixture(scope="module")
def pieces():
    return {
        make.__name__: Pieces(make(), "processing_class")
        for make in (bytes_of_gpt2, pieces_of_llama2, unigram)
    }


@pytest.mark.parametrize("ours", ["bytes_of_gpt2", "pieces_of_llama2"])
@pytest.mark.parametrize("theirs", ["bytes_of_gpt2", "pieces_of_llama2", "unigram"])
def test_each_span_is_the_same_text(pieces, ours, theirs):
    mine, other = pieces[ours], pieces[theirs]
    for text in random_texts(60, seed=3):
        ids = mine.tokenizer(text)["input_ids"]
        found = translate(ids, mine, other)
        assert len(found.our_spans) == len(ids)
        assert len(found.spans) == len(found.ids)
        count = max(found.our_spans) + 1
        for span in range(count):
            ends = []
            for each, numbers, of in ((mine, ids, found.our_spans), (other, found.ids, found.spans)):
                at = [i for i, number in enumerate(of) if number == span]
                assert at == list(range(at[0], at[-1] + 1))
                parts = [number for number in (numbers[i] for i in at) if number not in each.special]
                ends.append(b"".join(each.of(parts)).lstrip(b" "))
            assert ends[0] == ends[1]


def test_one_tokenizer_is_translated_into_itself(pieces):
    mine = pieces["bytes_of_gpt2"]
    for text in random_texts(20, seed=4):
        ids = mine.tokenizer(text)["input_ids"]
        found = translate(ids, mine, mine)
        assert found.ids == ids
        assert found.our_spans == found.spans
        assert NONE not in found.spans


def test_special_tokens_become_their_counterparts(pieces):
    mine, other = pieces["bytes_of_gpt2"], pieces["pieces_of_llama2"]
    start, end, turn = mine.tokenizer.convert_tokens_to_ids(["<s>", "</s>", "<|im_start|>"])
    found = translate([start, turn, *mine.encode("grain"), end], mine, other)
    assert found.ids[0] == other.tokenizer.bos_token_id
    assert found.ids[-1] == other.tokenizer.eos_token_id
    assert found.our_spans[1] == NONE  # the teacher does not know it
    assert found.our_spans[0] == found.spans[0] == 0
    assert found.our_spans[-1] == found.spans[-1] != NONE
    # What the teacher's tokenizer begins with is there in any case.
    assert translate(mine.encode("grain"), mine, other).ids[0] == other.begins_with
    assert translate(mine.encode("grain"), mine, other).spans[0] == NONE


def test_the_text_of_all_bytes_is_found(pieces):
    text = "Größe: 3 € 🙂\n\tnew line"
    for mine in (pieces["bytes_of_gpt2"], pieces["pieces_of_llama2"]):
        assert b"".join(mine.of(mine.encode(text))).decode().lstrip() == text


def test_tokenizers_without_the_text_of_their_tokens_are_refused():
    with pytest.raises(ValueError, match="`teacher_processing_class` does not tell the text"):
        Pieces(words_of_clip(), "teacher_processing_class")
    with pytest.raises(ValueError, match="is a NoneType: .* needs a fast tokenizer"):
        Pieces(None, "processing_class")
