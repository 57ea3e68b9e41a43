"""GGUF files, run by llama.cpp as if they were models of transformers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.utils import ModelOutput

SPARE = 256
"""Tokens that can follow the first ones of a cached row, at least."""


@dataclass
class Decoded(ModelOutput):
    """As transformers' decoders have it: logits (rows, length, vocabulary), and what goes on."""

    logits: Tensor | None = None
    past_key_values: LlamaCpp | None = None


class LlamaCpp:
    """A decoder of llama.cpp on the CPU, called with the tensors that transformers' decoders take.

    file: the GGUF. threads: by default as many as torch has.
    """

    def __init__(self, file: str | Path, *, threads: int | None = None) -> None:
        self._file = str(file)
        self._threads = threads or torch.get_num_threads()
        self._llama: Any = None

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: LlamaCpp | None = None,
        use_cache: bool = False,
    ) -> Decoded:
        """Logits of each token, zeros for those that are masked.

        input_ids: (rows, length). attention_mask: as them, 0 for padding, which is at the end.
        use_cache: of one row; what comes back as `past_key_values` continues it.

        Raises ValueError for padding in front, and a cache of several rows or one that is full: it has
        room for `SPARE` tokens after the first at least.
        """
        lengths = [input_ids.shape[1]] * len(input_ids)
        if attention_mask is not None and past_key_values is None:
            lengths = attention_mask.sum(1).tolist()
            if any(bool((row[:n] == 0).any()) for row, n in zip(attention_mask, lengths, strict=True)):
                raise ValueError("llama.cpp takes rows whose padding is at their end.")
        if use_cache and len(input_ids) > 1:
            raise ValueError(f"one row can be cached, there are {len(input_ids)}.")
        if past_key_values is None:
            self._make_room(input_ids.shape[1])
        elif self._llama.n_tokens + input_ids.shape[1] > self._llama.n_ctx():
            raise ValueError(f"the cache has room for {self._llama.n_ctx()} tokens.")
        rows = []
        for tokens, length in zip(input_ids, lengths, strict=True):
            if past_key_values is None:
                self._llama.reset()
            begin = self._llama.n_tokens
            self._llama.eval(tokens[:length].tolist())
            scores = np.zeros((len(tokens), self._llama.n_vocab()), dtype=np.float32)
            scores[:length] = self._llama.scores[begin : begin + length]
            rows.append(torch.from_numpy(scores))
        logits = torch.stack(rows)
        return Decoded(logits=logits, past_key_values=self if use_cache else None)

    def _make_room(self, length: int) -> None:
        """llama.cpp holds the logits of as many tokens as it is told in the beginning."""
        from llama_cpp import Llama

        if self._llama is not None and length + SPARE <= self._llama.n_ctx():
            return
        self._llama = None
        self._llama = Llama(
            self._file,
            n_ctx=length + SPARE,
            n_threads=self._threads,
            n_threads_batch=self._threads,
            logits_all=True,
            verbose=False,
        )
