"""Small tokenizers of every kind, trained here on Reuters, and texts to try them on."""

import json
import random

import torch
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
    BertConfig,
    PreTrainedTokenizerFast,
)

from hf_compress.samples import corpus

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}
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
