"""A fast tokenizer with some of its tokens: its serialised form, cut and renumbered.

Why the tokens of a text stay the same when only unused ones go:
WordPiece  takes the longest piece that fits; the longest of all is the longest of those kept.
BPE        merges by rank; the merges that made the used tokens are kept, in their order.
Unigram    takes the best path; no path is added by removing pieces, and the best one is kept.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import islice, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

State = dict[str, Any]  # a parsed tokenizer.json
_BATCH = 1000


def needed_tokens(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> set[int]:
    """Ids of the tokens to keep so that each of `texts` gives the same tokens as before.

    These are what the texts use, special and added tokens, what the used ones are made of, and the
    alphabet: the single characters of the used tokens, and all bytes where the tokenizer knows bytes.
    With it, a new word of known characters is spelt rather than unknown.

    Raises ValueError for a kind of tokenizer that is not known, and when the texts have no tokens.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    kind = state["model"]["type"]
    if kind not in ("WordPiece", "WordLevel", "BPE", "Unigram"):
        raise ValueError(f"`tokenizer` is {kind}: WordPiece, BPE, Unigram and WordLevel can be cut.")
    number = tokenizer.get_vocab()
    ids, unknown = _used(tokenizer, texts, number.get(_unknown_token(state["model"]) or ""))
    if not ids:
        raise ValueError("`texts` hold no token: pass the texts whose tokens are to be kept.")
    token = {i: name for name, i in number.items()}
    used = {token[i] for i in ids}
    if kind == "WordPiece":
        used |= _tried(unknown, tokenizer.backend_tokenizer, state["model"])
    if kind == "BPE":
        used |= _made_of(used, state["model"])
    used |= _alphabet(used, state) | _always(tokenizer, state)
    return {number[name] for name in used if name in number}


def with_tokens(tokenizer: PreTrainedTokenizerFast, kept: Iterable[int]) -> PreTrainedTokenizerFast:
    """A new tokenizer of the same class with the tokens `kept`, numbered from 0 in their old order.

    Raises ValueError when the class does not load what was written as it was written.
    """
    names = {i: name for name, i in tokenizer.get_vocab().items()}
    number = {names[old]: new for new, old in enumerate(sorted(kept))}
    state = _cut(json.loads(tokenizer.backend_tokenizer.to_str()), number)
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        (Path(folder) / "tokenizer.json").write_text(json.dumps(state), encoding="utf-8")
        smaller = type(tokenizer).from_pretrained(folder)
    # Some classes build themselves from the tokens alone, with settings of their own.
    if json.loads(smaller.backend_tokenizer.to_str()) != state:
        raise ValueError(
            f"{type(tokenizer).__name__} does not load its tokenizer.json as it is written: load the "
            "tokenizer as PreTrainedTokenizerFast, which does."
        )
    smaller.name_or_path = tokenizer.name_or_path
    return smaller


def _used(
    tokenizer: PreTrainedTokenizerFast, texts: Iterable[str], unknown: int | None
) -> tuple[set[int], set[str]]:
    """Ids of all tokens of `texts`, and the parts of the texts that are unknown."""
    # A copy, since truncation and padding are settings of the tokenizer itself.
    probe = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    probe.no_truncation()
    probe.no_padding()
    probe.encode_special_tokens = tokenizer.split_special_tokens
    ids: set[int] = set()
    words: set[str] = set()
    remaining = iter(texts)
    while batch := list(islice(remaining, _BATCH)):
        if other := [text for text in batch if not isinstance(text, str)]:
            raise TypeError(f"`texts` hold {other[0]!r}, which is no string.")
        encodings = probe.encode_batch(batch, add_special_tokens=False)
        for text, encoding in zip(batch, encodings, strict=True):
            ids.update(encoding.ids)
            if unknown in encoding.ids:
                places = zip(encoding.ids, encoding.offsets, strict=True)
                words.update(text[slice(*place)] for i, place in places if i == unknown)
    return ids, words


def _unknown_token(model: State) -> str | None:
    if model["type"] == "Unigram":
        return None if model["unk_id"] is None else model["vocab"][model["unk_id"]][0]
    return model["unk_token"]


def _tried(unknown: Iterable[str], backend: Tokenizer, model: State) -> set[str]:
    """Pieces that WordPiece takes before it finds that a word is unknown. Without them it would try
    shorter ones, and might find the word known."""
    pieces: set[str] = set()
    for part in unknown:
        text = backend.normalizer.normalize_str(part) if backend.normalizer else part
        words = (
            backend.pre_tokenizer.pre_tokenize_str(text) if backend.pre_tokenizer else [(text, None)]
        )
        for word, _ in words:
            pieces.update(_longest_pieces(word, model["vocab"], model["continuing_subword_prefix"]))
    return pieces


def _longest_pieces(word: str, vocabulary: dict[str, int], prefix: str) -> Iterator[str]:
    start = 0
    while start < len(word):
        lead = prefix if start else ""
        ends = range(len(word), start, -1)
        end = next((end for end in ends if lead + word[start:end] in vocabulary), None)
        if end is None:
            return
        yield lead + word[start:end]
        start = end


def _made_of(used: Iterable[str], model: State) -> set[str]:
    """All that BPE makes on the way to the `used` tokens.

    No merge crosses the border of a final token, so a token's own characters merge in the same way.
    """
    prefix, suffix = model["continuing_subword_prefix"] or "", model["end_of_word_suffix"] or ""
    rank = {tuple(pair): i for i, pair in enumerate(model["merges"])}
    made: set[str] = set()
    for token in used:
        parts = _characters(token, prefix, suffix)
        seen = set(parts)
        while len(parts) > 1:
            best, place = min((rank.get(pair, len(rank)), i) for i, pair in enumerate(pairwise(parts)))
            if best == len(rank):
                break
            parts[place : place + 2] = [parts[place] + parts[place + 1].removeprefix(prefix)]
            seen.add(parts[place])
        # An added token, a byte, or a whole word taken as it is was not merged.
        if parts == [token]:
            made |= seen
    return made


def _characters(token: str, prefix: str, suffix: str) -> list[str]:
    """What BPE begins with: "##low</w>" is "##l", "##o", "##w</w>"."""
    inside = token.removeprefix(prefix).removesuffix(suffix)
    if not inside:
        return [token]
    characters = [prefix + character for character in inside]
    if not token.startswith(prefix):
        characters[0] = inside[0]
    if token.endswith(suffix):
        characters[-1] += suffix
    return characters


def _alphabet(used: Iterable[str], state: State) -> set[str]:
    """Single characters of the used tokens and all bytes, in each form they take within a word."""
    model = state["model"]
    characters = set().union(*used)
    if any(part.get("type") == "ByteLevel" for part in _objects(state)):
        characters |= set(ByteLevel.alphabet())
    prefixes = {"", model.get("continuing_subword_prefix") or ""}
    suffixes = {"", model.get("end_of_word_suffix") or ""}
    forms = {p + c + s for p in prefixes for c in characters for s in suffixes}
    if model.get("byte_fallback"):
        forms |= {f"<0x{byte:02X}>" for byte in range(256)}
    return forms


def _always(tokenizer: PreTrainedTokenizerFast, state: State) -> set[str]:
    """Tokens that the tokenizer itself refers to."""
    names = {added["content"] for added in state["added_tokens"]} | set(tokenizer.all_special_tokens)
    names |= set(_inserted(state["post_processor"]))
    if state["padding"] is not None:
        names.add(state["padding"]["pad_token"])
    if (unknown := _unknown_token(state["model"])) is not None:
        names.add(unknown)
    if state["model"]["type"] == "Unigram":
        # Unknown characters are scored relative to the lowest score.
        names.add(min(state["model"]["vocab"], key=lambda piece: piece[1])[0])
    return names


def _inserted(post_processor: State | None) -> Iterator[str]:
    """Tokens that are put around a text."""
    for part in _objects(post_processor):
        if "tokens" in part and "ids" in part:
            yield from part["tokens"]
        yield from (part[name][0] for name in ("sep", "cls") if name in part)


def _cut(state: State, number: dict[str, int]) -> State:
    """`state` with the tokens that have a new `number`; changes it in place."""
    model = state["model"]
    if model["type"] == "Unigram":
        unknown = _unknown_token(model)
        model["vocab"] = [piece for piece in model["vocab"] if piece[0] in number]
        model["unk_id"] = None if unknown is None else number[unknown]
    else:
        model["vocab"] = {token: number[token] for token in model["vocab"] if token in number}
    if model["type"] == "BPE":
        prefix = model["continuing_subword_prefix"] or ""
        model["merges"] = [
            [left, right]
            for left, right in model["merges"]
            if {left, right, left + right.removeprefix(prefix)} <= number.keys()
        ]
    for added in state["added_tokens"]:
        added["id"] = number[added["content"]]
    for part in _objects(state["post_processor"]):
        if "tokens" in part and "ids" in part:
            part["ids"] = [number[token] for token in part["tokens"]]
        for name in ("sep", "cls"):
            if name in part:
                part[name] = [part[name][0], number[part[name][0]]]
    if state["padding"] is not None:
        state["padding"]["pad_id"] = number[state["padding"]["pad_token"]]
    return state


def _objects(node: Any) -> Iterator[State]:
    """Every JSON object in `node` outside of vocabularies."""
    if isinstance(node, dict):
        yield node
        node = [value for key, value in node.items() if key not in ("vocab", "merges", "added_tokens")]
    if isinstance(node, list):
        for value in node:
            yield from _objects(value)
