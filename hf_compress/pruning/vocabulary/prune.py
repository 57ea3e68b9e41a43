"""Vocabulary pruning: a model and its tokenizer with the tokens that some texts use."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from hf_compress.pruning.vocabulary.tokenizer import needed_tokens, with_tokens
from hf_compress.targets import without_adapters

# Names in a config whose values are ids that must go on existing.
_IDS = re.compile(r".*_token_(id|ids|index)|(lang|task)_to_id")
# Names whose values are lists of ids that are not to be generated; an id that is gone never will be.
_SUPPRESSED = ("suppress_tokens", "begin_suppress_tokens")
# Ids in other shapes, which nothing here renumbers.
_UNKNOWN = ("bad_words_ids", "force_words_ids", "forced_decoder_ids", "sequence_bias")
# Beyond these, a size of a vocabulary means a table that is not cut.
_SIZES = ("vocab_size", "type_vocab_size")


def prune_vocabulary(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A smaller model and tokenizer of the same classes, with the tokens that `texts` need.

    Everything of the vocabulary's size shrinks together: input embedding, tied or untied head, its
    bias. Ids in the config and the generation config are renumbered, and the config does not name the
    model that it came from any more, whose tokenizer is another. The arguments are unchanged; what is
    returned saves and loads with plain `save_pretrained` and `from_pretrained`. Compare TextPruner
    (ACL 2022, arXiv:2203.15996).

    For each of `texts` the new tokenizer gives the tokens that the old one gave, so the model gives
    the same outputs, its head at the kept tokens. Kept besides: special and added tokens, and single
    characters and bytes, so that any other text is tokenized too, into more and smaller tokens, or as
    unknown where the old tokenizer would do so for a character outside of `texts`. What a chat
    template adds must be in `texts`, as it is written.

    model: any class that has one vocabulary. tokenizer: a fast one (WordPiece, BPE, Unigram).
    texts: strings, as they are given to the tokenizer; read once, a thousand at a time.

    Raises TypeError for a slow tokenizer and for `texts` that are no strings; ValueError for adapters,
    quantized models, a tokenizer of another size than the model, texts without tokens, and models
    with ids or vocabularies that are not known here.
    """
    _check_types(model, tokenizer, texts)
    rows = _check_model(model)
    _check_sizes(tokenizer, rows)
    tokens = needed_tokens(tokenizer, texts)
    names = set(tokenizer.get_vocab().values())
    for config in _configs(model):
        tokens |= {i for i in _required_ids(config) if i in names}
    smaller_tokenizer = with_tokens(tokenizer, tokens)
    # Ids in use that have a row but no token stay behind the tokens.
    others = {i for config in _configs(model) for i in _required_ids(config) if 0 <= i < rows} - tokens
    return _with_rows(model, [*sorted(tokens), *sorted(others)]), smaller_tokenizer


def _check_types(model: Any, tokenizer: Any, texts: Any) -> None:
    if not isinstance(without_adapters(model), PreTrainedModel):
        raise TypeError(f"`model` is a {type(model).__name__}: pass a transformers model.")
    if without_adapters(model) is not model:
        raise ValueError(
            "`model` has adapters: merge them (`merge_and_unload`), then cut its vocabulary."
        )
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise TypeError(
            f"`tokenizer` is a {type(tokenizer).__name__}: pass a fast one, whose whole state is its "
            "tokenizer.json (`AutoTokenizer` gives it where it exists)."
        )
    if isinstance(texts, str):
        raise TypeError("`texts` is one string: pass a list of strings.")


def _check_model(model: PreTrainedModel) -> int:
    """The number of rows of the vocabulary. Raises where the model cannot be cut."""
    kind = type(model).__name__
    if hasattr(model.config, "quantization_config"):
        raise ValueError(
            f"{kind} is quantized: cut the vocabulary first, then load the result in 8 or 4 bit."
        )
    text = model.config.get_text_config()
    table = model.get_input_embeddings()
    rows = table.weight.shape[0] if isinstance(table, nn.Embedding) else None
    if rows is None or rows != text.vocab_size:
        raise ValueError(
            f"{kind} has an embedding of {rows} tokens where its config says {text.vocab_size}: only "
            "models with one table of the vocabulary can be cut."
        )
    for config in _configs(model):
        for name, value in vars(config).items():
            if value and (name in _UNKNOWN or ("vocab_size" in name and name not in _SIZES)):
                raise ValueError(
                    f"{kind} has `{name}`={value!r} in its {type(config).__name__}, which cannot be "
                    "renumbered here: set it to None where it is not needed."
                )
    return rows


def _check_sizes(tokenizer: PreTrainedTokenizerFast, rows: int) -> None:
    highest = max(tokenizer.get_vocab().values())
    # Embeddings are padded to multiples of 64 or 128, and may reserve some rows.
    if highest >= rows or rows - highest - 1 > max(128, rows // 10):
        raise ValueError(
            f"`tokenizer` has ids up to {highest} and the model {rows} rows: is it the model's own? If "
            "so, call `model.resize_token_embeddings(len(tokenizer))` first."
        )


def _configs(model: PreTrainedModel) -> Iterator[PreTrainedConfig | GenerationConfig]:
    """The configs that hold ids of this vocabulary; others, of codecs say, have their own."""
    text = model.config.get_text_config()
    yield text
    if text is not model.config:
        yield model.config
    if model.can_generate():
        yield model.generation_config


def _required_ids(config: PreTrainedConfig | GenerationConfig) -> Iterator[int]:
    for name, value in vars(config).items():
        if _IDS.fullmatch(name):
            yield from _flat(value)


def _flat(value: Any) -> Iterator[int]:
    if isinstance(value, (list, tuple)):
        yield from value
    elif isinstance(value, dict):
        yield from value.values()
    elif value is not None:
        yield value


def _with_rows(model: PreTrainedModel, rows: list[int]) -> PreTrainedModel:
    """A new model whose token i is token rows[i] of `model`."""
    number = {old: new for new, old in enumerate(rows)}
    config = copy.deepcopy(model.config)
    config.name_or_path = ""  # where another tokenizer is
    text = config.get_text_config()
    for part in (text,) if text is config else (text, config):
        _renumber_(part, number)
        if "vocab_size" in vars(part):
            part.vocab_size = len(rows)
    text.vocab_size = len(rows)
    smaller = type(model)(config)
    before, after = model.state_dict(), smaller.state_dict()
    if other := sorted(before.keys() ^ after.keys()):
        raise ValueError(
            f"{type(model).__name__} and its config differ in {other[:3]}: cut the vocabulary of the "
            "plain model, without adapters or changed modules."
        )
    index = torch.tensor(rows)
    smaller.load_state_dict(
        {name: _cut(name, tensor, after[name].shape, index) for name, tensor in before.items()},
        assign=True,
    )
    smaller.tie_weights()
    if model.can_generate():
        smaller.generation_config = copy.deepcopy(model.generation_config)
        _renumber_(smaller.generation_config, number)
    nn.Module.to(smaller, device=model.device)
    return smaller.train(model.training)


def _cut(name: str, tensor: Tensor, shape: torch.Size, index: Tensor) -> Tensor:
    """`tensor` at `index` along the one axis that the smaller model has of another size."""
    axes = [axis for axis, size in enumerate(shape) if tensor.shape[axis] != size]
    if not axes:
        return tensor.clone()
    if len(axes) > 1 or shape[axes[0]] != len(index):
        raise ValueError(
            f"{name} is {tuple(tensor.shape)} and would become {tuple(shape)} with {len(index)} "
            "tokens: only models with one plain vocabulary can be cut."
        )
    return tensor.index_select(axes[0], index.to(tensor.device))


def _renumber_(config: PreTrainedConfig | GenerationConfig, number: dict[int, int]) -> None:
    for name, value in list(vars(config).items()):
        if _IDS.fullmatch(name):
            setattr(config, name, _renumbered(value, number))
        elif name in _SUPPRESSED and value is not None:
            setattr(config, name, [number[i] for i in value if i in number])


def _renumbered(value: Any, number: dict[int, int]) -> Any:
    if isinstance(value, dict):
        return {key: _renumbered(i, number) for key, i in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_renumbered(i, number) for i in value)
    # An id beyond the vocabulary, such as -1 or a default of another model, means no token.
    return number.get(value, value)
