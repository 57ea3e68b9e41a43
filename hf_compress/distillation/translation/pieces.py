"""What the tokens of a tokenizer stand for, in bytes of text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

_SPACE = "▁"


class Pieces:
    """The bytes of each token of a language model's tokenizer, and its special tokens, which stand for
    no text.

    name: of the argument, for the messages. Raises ValueError for anything but a fast tokenizer whose
    tokens are bytes (GPT-2, Llama 3, Qwen) or pieces with "▁" for a space (Llama 2, T5).
    """

    def __init__(self, tokenizer: Any, name: str) -> None:
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise ValueError(
                f"`{name}` is a {type(tokenizer).__name__}: tokens of two tokenizers are compared by "
                "the text that they stand for, which needs a fast tokenizer (AutoTokenizer)."
            )
        self.tokenizer = tokenizer
        of_bytes = _made_of_bytes(tokenizer, name)
        added = tokenizer.added_tokens_decoder
        literal = {number: token.content for number, token in added.items()}
        marked = {number for number, token in added.items() if token.special}
        self.special = frozenset(marked.union(tokenizer.all_special_ids))
        self._bytes = {
            number: literal[number].encode() if number in literal else of_bytes(token)
            for token, number in tokenizer.get_vocab().items()
        }
        first = tokenizer("a")["input_ids"][0]
        self.begins_with = first if first == tokenizer.bos_token_id else None
        """The token that the tokenizer puts before each text, if any."""

    def of(self, ids: Sequence[int]) -> list[bytes]:
        """Those of `ids`; a number that is no token, of a padded vocabulary, stands for nothing."""
        return [self._bytes.get(number, b"") for number in ids]

    def encode(self, text: str) -> list[int]:
        """The tokens of `text` alone."""
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def counterpart(self, other: Pieces, special: int) -> int | None:
        """The special token here that means what `special` does in `other`: of the same name, or the
        same role; None where there is none."""
        theirs = other.tokenizer
        same = self.tokenizer.get_vocab().get(str(theirs.convert_ids_to_tokens(special)))
        if same in self.special:
            return same
        for role in ("bos_token_id", "eos_token_id"):
            if special == getattr(theirs, role):
                return getattr(self.tokenizer, role)
        return None


def _made_of_bytes(tokenizer: PreTrainedTokenizerFast, name: str) -> Any:
    decoder = tokenizer.backend_tokenizer.decoder
    state = {} if decoder is None else json.loads(decoder.__getstate__())
    kinds = {part["type"] for part in _parts(state)}
    if "ByteLevel" in kinds:
        byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
        return lambda token: bytes(byte_of[c] for c in token if c in byte_of)
    spaced = any(_SPACE in str(part.get("pattern", {}).get("String")) for part in _parts(state))
    if spaced or "Metaspace" in kinds:
        return _piece
    raise ValueError(
        f"`{name}` does not tell the text of its tokens, which needs a tokenizer of bytes or one with "
        f"{_SPACE!r} for a space; its decoder is {', '.join(sorted(kinds)) or 'none'}."
    )


def _parts(state: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if "type" in state:
        yield state
    for part in state.get("decoders", ()):
        yield from _parts(part)


def _piece(token: str) -> bytes:
    byte = re.fullmatch(r"<0x([0-9A-F]{2})>", token)
    return bytes([int(byte[1], 16)]) if byte else token.replace(_SPACE, " ").encode()
