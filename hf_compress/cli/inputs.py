"""From raw rows to what a model reads: tokens, the pixels of images, or sound."""

from __future__ import annotations

from typing import Any

import numpy as np
from datasets import Audio, ClassLabel, Dataset
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoTokenizer,
    BaseImageProcessor,
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    SequenceFeatureExtractor,
    Wav2Vec2FeatureExtractor,
    default_data_collator,
)

from hf_compress.cli.arguments import DataArguments

Processor = PreTrainedTokenizerBase | BaseImageProcessor | SequenceFeatureExtractor


def load_processor(arguments: DataArguments) -> Any:
    """The tokenizer of the model, its image processor or its feature extractor, by the task.

    Raises ValueError where there is none, and as `load_tokenizer`.
    """
    if arguments.task == "image-classification":
        return _load(AutoImageProcessor, arguments.model, "image processor")
    if arguments.task == "audio-classification":
        return _load(AutoFeatureExtractor, arguments.model, "feature extractor")
    return load_tokenizer(arguments)


def load_tokenizer(arguments: DataArguments) -> PreTrainedTokenizerBase:
    """That of the model. Raises ValueError where there is none, and for a `max_length` that the model
    or its tokenizer is not made for."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        config = AutoConfig.from_pretrained(arguments.model)
    except (OSError, ValueError) as error:
        # Without a connection transformers does not say of which model it speaks.
        raise ValueError(f"`model` {arguments.model!r} cannot be loaded: {error}") from error
    most = longest(config, tokenizer)
    if arguments.max_length > most:
        raise ValueError(
            f"`max_length` is {arguments.max_length}: {arguments.model} is for at most {most} tokens."
        )
    return tokenizer


def longest(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens of a row that model and tokenizer are made for, at most."""
    # Not every architecture counts positions, and not every tokenizer knows of its model's.
    positions = getattr(config, "max_position_embeddings", None) or tokenizer.model_max_length
    return min(positions, tokenizer.model_max_length)


def prepared(
    rows: Dataset, processor: Processor, arguments: DataArguments, names: list[str] | None
) -> Dataset:
    """Raw rows as the model reads them; `labels` are indices into `names`, or without these the tokens.

    processor: what `load_processor` gave. Raises ValueError for what is no sound.
    """
    if isinstance(processor, PreTrainedTokenizerBase):
        return tokenized(rows, processor, arguments, names)
    if isinstance(processor, BaseImageProcessor):
        return _with_pixels(rows, processor, arguments, names or [])
    return _with_sound(rows, processor, arguments, names or [])


def collator_of(processor: Processor, *, labelled: bool) -> Any:
    """What puts rows of `prepared` into batches: texts and raw sound are padded to the longest.

    labelled: whether rows have labels of their own, which those of a causal language model have not.
    """
    if isinstance(processor, PreTrainedTokenizerBase) and not labelled:
        return language_collator(processor)
    if is_padded(processor):
        return DataCollatorWithPadding(processor)  # type: ignore[arg-type]  # `pad` is all it asks for
    return default_data_collator


def is_padded(processor: Processor | None) -> bool:
    """Whether rows differ in length: of tokens or of samples, but not of pixels or spectrograms."""
    return isinstance(processor, (PreTrainedTokenizerBase, Wav2Vec2FeatureExtractor))


def language_collator(tokenizer: PreTrainedTokenizerBase) -> DataCollatorForLanguageModeling:
    """Of a causal language model, whose padding has no labels."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return DataCollatorForLanguageModeling(tokenizer, mlm=False)


def tokenized(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    arguments: DataArguments,
    names: list[str] | None,
) -> Dataset:
    """Rows of token ids, cut to `max_length`; `labels` are indices into `names`, or the ids."""

    def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
        texts = batch[arguments.text_column]
        encoded = tokenizer(texts, truncation=True, max_length=arguments.max_length)
        return dict(encoded) if names is None else {**encoded, **_labels(batch, rows, arguments, names)}

    return rows.map(encode, batched=True, remove_columns=rows.column_names, desc="Tokenizing")


def _with_pixels(rows: Dataset, processor: Any, arguments: DataArguments, names: list[str]) -> Dataset:
    # Gray images among coloured ones, and the other way round, are common.
    mode = "L" if np.size(processor.image_mean) == 1 else "RGB"

    def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
        images = [image.convert(mode) for image in batch[arguments.image_column]]
        pixels = processor(images, return_tensors="np")["pixel_values"]
        return {"pixel_values": pixels, **_labels(batch, rows, arguments, names)}

    made = rows.map(encode, batched=True, remove_columns=rows.column_names, desc="Reading images")
    return made.with_format("torch")


def _with_sound(rows: Dataset, extractor: Any, arguments: DataArguments, names: list[str]) -> Dataset:
    """Raw sound is cut to `max_seconds`; a spectrogram has the size that its extractor is for."""
    column, rate = arguments.audio_column, extractor.sampling_rate
    feature = rows.features[column]
    if isinstance(feature, Audio):
        rows = rows.cast_column(column, Audio(sampling_rate=rate, num_channels=1))
    elif not isinstance(feature, dict) or not {"array", "sampling_rate"} <= feature.keys():
        raise ValueError(
            f"column {column!r} is no sound: it has to be of `datasets.Audio`, or hold the samples as "
            "`array` and their `sampling_rate`."
        )
    cut: dict[str, Any] = {}
    if is_padded(extractor):
        cut = {"truncation": True, "max_length": max(1, round(arguments.max_seconds * rate))}

    def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
        heard = [(sound["array"], sound["sampling_rate"]) for sound in batch[column]]
        if other := {found for _, found in heard} - {rate}:
            raise ValueError(
                f"the sound has {min(other):,} samples a second, and the model is for {rate:,}: "
                "resample it, or give the column the feature `datasets.Audio`, which does that."
            )
        made = extractor([array for array, _ in heard], sampling_rate=rate, **cut)
        known = {name: made[name] for name in extractor.model_input_names if name in made}
        return {**known, **_labels(batch, rows, arguments, names)}

    made = rows.map(encode, batched=True, remove_columns=rows.column_names, desc="Reading sound")
    return made.with_format("torch")


def _labels(
    batch: dict[str, list[Any]], rows: Dataset, arguments: DataArguments, names: list[str]
) -> dict[str, list[int]]:
    values, feature = batch[arguments.label_column], rows.features[arguments.label_column]
    if isinstance(feature, ClassLabel):
        values = feature.int2str(values)
    return {"labels": [names.index(str(value)) for value in values]}


def _load(kind: Any, model: str, what: str) -> Any:
    try:
        return kind.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ValueError(f"`model` {model!r} has no {what}: {error}") from error
