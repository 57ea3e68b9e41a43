import copy
import json
import random

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_bert
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BartConfig,
    BertConfig,
    ByT5Tokenizer,
    ElectraConfig,
    GPT2Config,
    GPT2Tokenizer,
    LlamaConfig,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5Tokenizer,
)

from hf_compress import quantized
from hf_compress.pruning.vocabulary.prune import prune_vocabulary
from hf_compress.samples import corpus, minilm

TEXTS = corpus("reuters-r8")["train"]["text"]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]


def wrapped(tokenizer):
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        mask_token="<mask>",
    )


def around(tokenizer):
    """Puts <s> and </s> around each text, by number."""
    number = tokenizer.token_to_id
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", number("<s>")), ("</s>", number("</s>"))]
    )
    return wrapped(tokenizer)


def wordpiece():
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=900, special_tokens=SPECIAL, limit_alphabet=40, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS[:300], trainer)
    number = tokenizer.token_to_id
    tokenizer.post_processor = processors.BertProcessing(
        ("</s>", number("</s>")), ("<s>", number("<s>"))
    )
    tokenizer.enable_padding(pad_id=number("<pad>"), pad_token="<pad>")
    tokenizer.enable_truncation(16)
    return wrapped(tokenizer)


def unigram():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=900, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS[:300], trainer)
    return around(tokenizer)


def bytes_of_gpt2(**model):
    tokenizer = Tokenizer(models.BPE(**model))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS[:300], trainer)
    # Tokens beyond those of the model, as chat models have them.
    tokenizer.add_tokens(["<tool>"])
    tokenizer.add_special_tokens(["<|im_start|>"])
    return around(tokenizer)


def bytes_of_llama3():
    # It takes a word whole where it knows it, whether or not merges lead there.
    return bytes_of_gpt2(ignore_merges=True)


def pieces_of_llama2():
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=SPECIAL, limit_alphabet=60, show_progress=False
    )
    trained.train_from_iterator(TEXTS[:300], trainer)
    model = json.loads(trained.to_str())["model"]
    names = list(model["vocab"]) + [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(
        models.BPE(
            {name: i for i, name in enumerate(names)},
            [tuple(pair) for pair in model["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(SPECIAL)
    return around(tokenizer)


def words_of_clip():
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), "removed")
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=SPECIAL, end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS[:300], trainer)
    return around(tokenizer)


def marked_parts():
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", continuing_subword_prefix="##"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=SPECIAL, continuing_subword_prefix="##", show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS[:300], trainer)
    return around(tokenizer)


def whole_words():
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(vocab_size=900, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(TEXTS[:300], trainer)
    return around(tokenizer)


BUILDERS = (
    wordpiece,
    unigram,
    bytes_of_gpt2,
    bytes_of_llama3,
    pieces_of_llama2,
    words_of_clip,
    marked_parts,
    whole_words,
)


@pytest.fixture(scope="module", params=BUILDERS, ids=lambda build: build.__name__)
def tokenizer(request):
    return request.param()


def bare(names):
    return wrapped(Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, "<unk>")))


def random_texts(count, seed):
    """Words and parts of words of the corpus, and characters of many scripts, in no order."""
    draw = random.Random(seed)
    words = " ".join(TEXTS[:200]).split()
    strange = "".join(map(chr, range(33, 600))) + "日本語한국어🙂\u0301\t\n  ﬁ½☃"

    def part():
        word = draw.choice(words)
        match draw.randrange(5):
            case 0:
                return word[: draw.randint(1, len(word))] + draw.choice(words)[-3:]
            case 1:
                return "".join(draw.choices(strange, k=draw.randint(1, 6)))
            case 2:
                return word + draw.choice(strange) + draw.choice(words)
            case _:
                return word

    return [
        draw.choice(["", " "]).join(part() for _ in range(draw.randint(1, 12))) for _ in range(count)
    ]


def bert_of(tokenizer):
    return AutoModel.from_config(BertConfig(vocab_size=len(tokenizer), pad_token_id=0, **SMALL))


def kept(before, after):
    """The old id of each new token."""
    return torch.tensor(
        before.convert_tokens_to_ids(after.convert_ids_to_tokens(list(range(len(after)))))
    )


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


def test_a_real_model_gives_the_same_outputs():
    before, model = AutoTokenizer.from_pretrained(minilm()), AutoModel.from_pretrained(minilm())
    state = before.backend_tokenizer.to_str()
    weights = copy.deepcopy(model.state_dict())
    smaller, after = prune_vocabulary(model, before, TEXTS[:200])
    assert type(after) is type(before)
    assert type(smaller) is type(model)
    assert before.backend_tokenizer.to_str() == state
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    assert len(after) == smaller.config.vocab_size < 6000
    batches = (
        each(TEXTS[:4], padding=True, truncation=True, return_tensors="pt") for each in (before, after)
    )
    with torch.no_grad():
        expected, found = (
            each.eval()(**batch).last_hidden_state
            for each, batch in zip((model, smaller), batches, strict=True)
        )
    assert torch.equal(expected, found)


SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}
PAIR = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
MODELS = {
    "bert": (AutoModelForMaskedLM, BertConfig(**SMALL)),
    "bert untied": (AutoModelForMaskedLM, BertConfig(tie_word_embeddings=False, **SMALL)),
    "bert classifier": (AutoModelForSequenceClassification, BertConfig(num_labels=3, **SMALL)),
    "electra": (AutoModelForMaskedLM, ElectraConfig(embedding_size=8, **SMALL)),
    "llama": (AutoModelForCausalLM, LlamaConfig(**SMALL)),
    "llama tied": (AutoModelForCausalLM, LlamaConfig(tie_word_embeddings=True, **SMALL)),
    "gpt2": (AutoModelForCausalLM, GPT2Config(n_embd=16, n_layer=1, n_head=2)),
    "t5": (AutoModelForSeq2SeqLM, T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)),
    "bart": (
        AutoModelForSeq2SeqLM,
        BartConfig(decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, **PAIR),
    ),
}


@pytest.fixture(scope="module")
def bytes_tokenizer():
    return bytes_of_gpt2()


def build(name, tokenizer, **ids):
    auto_class, config = MODELS[name]
    config = copy.deepcopy(config)
    number = tokenizer.convert_tokens_to_ids
    config.vocab_size = len(tokenizer) + 7  # rows beyond the tokens, as padded embeddings have them
    config.pad_token_id, config.bos_token_id, config.eos_token_id = number(["<pad>", "<s>", "</s>"])
    if config.is_encoder_decoder:
        config.decoder_start_token_id = number("<|im_start|>")
    model = auto_class.from_config(config).eval()
    # Biases of heads begin at zero, where a wrong order would not show.
    torch.manual_seed(0)
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.shape[-1:] == (config.vocab_size,):
            tensor.data.normal_()
    return auto_class, model


@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_equal_at_the_kept_tokens(name, bytes_tokenizer, tmp_path):
    auto_class, model = build(name, bytes_tokenizer)
    texts = [*TEXTS[:20], "<tool> oil"]
    smaller, tokenizer = prune_vocabulary(model, bytes_tokenizer, texts)
    old = kept(bytes_tokenizer, tokenizer)
    assert smaller.config.vocab_size == len(tokenizer) < len(bytes_tokenizer)
    smaller.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = auto_class.from_pretrained(tmp_path)
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in texts[-3:]:
        before = bytes_tokenizer(text[:80], return_tensors="pt", return_token_type_ids=False)
        for each, new in ((tokenizer, smaller), (reloaded, again)):
            after = each(text[:80], return_tensors="pt", return_token_type_ids=False)
            more = {}, {}
            if model.config.is_encoder_decoder:
                more = {"decoder_input_ids": before.input_ids}, {"decoder_input_ids": after.input_ids}
            with torch.no_grad():
                expected, found = model(**before, **more[0]).logits, new(**after, **more[1]).logits
            if expected.shape[-1] == model.config.vocab_size:
                expected = expected[..., old]
            torch.testing.assert_close(found, expected)
    tied = smaller.config.tie_word_embeddings and smaller.get_output_embeddings() is not None
    if tied:
        assert smaller.get_output_embeddings().weight is smaller.get_input_embeddings().weight


def test_ids_in_configs_are_renumbered(bytes_tokenizer, tmp_path):
    _, model = build("bart", bytes_tokenizer)
    number = bytes_tokenizer.convert_tokens_to_ids
    settings = model.generation_config
    settings.eos_token_id = number(["</s>", "<tool>"])
    settings.forced_bos_token_id = number("\u0120said")  # used by no text here
    settings.suppress_tokens = number(["\u0120oil", "\u0120trade"])
    model.config.forced_eos_token_id = number("</s>")
    model.config.mask_token_id = len(bytes_tokenizer) + 3  # a row without a token
    model.config.sep_token_id = -1
    smaller, tokenizer = prune_vocabulary(model, bytes_tokenizer, [" the oil"])
    number = tokenizer.convert_tokens_to_ids
    for each in (smaller.config, smaller.generation_config):
        assert each.pad_token_id == number("<pad>")
        assert each.bos_token_id == number("<s>")
        assert each.decoder_start_token_id == number("<|im_start|>")
    assert smaller.generation_config.eos_token_id == number(["</s>", "<tool>"])
    assert smaller.generation_config.forced_bos_token_id == number("\u0120said")
    assert smaller.generation_config.suppress_tokens == [number("\u0120oil")]
    assert smaller.config.forced_eos_token_id == number("</s>")
    assert smaller.config.mask_token_id == len(tokenizer) == smaller.config.vocab_size - 1
    assert smaller.config.sep_token_id == -1
    table = smaller.get_input_embeddings()
    assert table.padding_idx == number("<pad>")
    row = model.get_input_embeddings().weight[len(bytes_tokenizer) + 3]
    assert torch.equal(table.weight[smaller.config.mask_token_id], row)


def test_dtypes_and_mode_stay(bytes_tokenizer):
    _, model = build("llama tied", bytes_tokenizer)
    model.to(torch.bfloat16)
    model.lm_head.weight.requires_grad_(False)
    smaller, _ = prune_vocabulary(model, bytes_tokenizer, ["oil"])
    assert {p.dtype for p in smaller.parameters()} == {torch.bfloat16}
    assert not smaller.training
    smaller.get_input_embeddings().weight.data.zero_()
    assert model.get_input_embeddings().weight.any()


def test_wrong_inputs_are_refused(bytes_tokenizer, tmp_path):
    auto_class, model = build("llama", bytes_tokenizer)
    with pytest.raises(ValueError, match="`texts` hold no token"):
        prune_vocabulary(model, bytes_tokenizer, [])
    with pytest.raises(ValueError, match="`texts` hold no token"):
        prune_vocabulary(model, bytes_tokenizer, ["", ""])
    with pytest.raises(TypeError, match="one string"):
        prune_vocabulary(model, bytes_tokenizer, "oil")
    with pytest.raises(TypeError, match="no string"):
        prune_vocabulary(model, bytes_tokenizer, [None])
    with pytest.raises(TypeError, match="fast one"):
        prune_vocabulary(model, ByT5Tokenizer(), ["oil"])
    with pytest.raises(TypeError, match="transformers model"):
        prune_vocabulary(torch.nn.Linear(2, 2), bytes_tokenizer, ["oil"])
    with pytest.raises(ValueError, match="resize_token_embeddings"):
        prune_vocabulary(tiny_bert(), bytes_tokenizer, ["oil"])
    with pytest.raises(ValueError, match="resize_token_embeddings"):
        prune_vocabulary(model, bare(["oil", *SPECIAL]), ["oil"])
    with pytest.raises(ValueError, match="merge_and_unload"):
        prune_vocabulary(get_peft_model(copy.deepcopy(model), LoraConfig()), bytes_tokenizer, ["oil"])
    hidden = copy.deepcopy(model)
    hidden.add_adapter(LoraConfig())
    with pytest.raises(ValueError, match="lora"):
        prune_vocabulary(hidden, bytes_tokenizer, ["oil"])
    model.generation_config.bad_words_ids = [[3, 4]]
    with pytest.raises(ValueError, match="bad_words_ids"):
        prune_vocabulary(model, bytes_tokenizer, ["oil"])


def test_a_quantized_model_is_refused(bytes_tokenizer, tmp_path):
    pytest.importorskip("bitsandbytes")
    auto_class, model = build("llama", bytes_tokenizer)
    model.save_pretrained(tmp_path)
    packed = auto_class.from_pretrained(tmp_path, quantization_config=quantized(8))
    with pytest.raises(ValueError, match="quantized"):
        prune_vocabulary(packed, bytes_tokenizer, ["oil"])
