"""Which models are understood, one row for each kind of head.

To add a head: a `Task` that says where its logits and labels are, and a row in `HEADS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto as auto

from hf_compress.distillation.tasks import labelled
from hf_compress.distillation.tasks.ctc import Ctc
from hf_compress.distillation.tasks.spans import POSITIONS, SPANS
from hf_compress.distillation.tasks.task import Batch, Task
from hf_compress.targets import without_adapters


@dataclass(frozen=True, kw_only=True)
class Head:
    """A family of models: the class that loads it, the names of its classes, and its task.

    task: model, first batch -> what it is trained for;
    labels: the entries of a batch that are labels;
    fits: whether a model of one of these classes is really meant;
    predicts_labels: whether its outputs are the labels named in the config;
    reads_text, writes_text: whether the vocabulary in the config is that of its inputs, its outputs;
    same: entries of the config that student and teacher must have in common;
    makes_decoder_inputs: whether the labels, shifted, are inputs as well.
    """

    name: str
    auto_class: Any
    class_names: frozenset[str]
    task: Callable[[Any, Batch], Task]
    labels: tuple[str, ...] = ("labels",)
    fits: Callable[[Any], bool] = lambda model: True
    predicts_labels: bool = False
    reads_text: bool = False
    writes_text: bool = False
    same: tuple[str, ...] = ()
    makes_decoder_inputs: bool = False

    def inputs(self, model: Any, batch: Batch) -> dict[str, Tensor]:
        """What both models are given: all but the labels, of which they would make a loss of their own.

        Decoders need the labels, shifted: they get them so, or where the model has no method to do so,
        as they are.
        """
        features = {name: value for name, value in batch.items() if name not in self.labels}
        given = features.keys() & {"decoder_input_ids", "decoder_inputs_embeds"}
        if not self.makes_decoder_inputs or given:
            return features
        (name,) = self.labels
        shift = getattr(without_adapters(model), "prepare_decoder_input_ids_from_labels", None)
        if shift is None:
            return {**features, name: batch[name]}
        return {**features, "decoder_input_ids": shift(batch[name])}


def head_of(model: nn.Module) -> Head:
    """The head of `model` by its class or a parent class. Raises ValueError where none is known."""
    inner = without_adapters(model)
    for parent in type(inner).__mro__:
        for head in HEADS:
            if (
                parent.__name__ in head.class_names
                and issubclass(parent, PreTrainedModel)
                and head.fits(inner)
            ):
                return head
    raise ValueError(
        f"Distillation does not know the head of {type(inner).__name__}. Supported: "
        + ", ".join(f"{head.name} ({head.auto_class.__name__})" for head in HEADS)
        + "."
    )


def problem_type_(config: Any, labels: Tensor) -> str:
    """What a classifier is trained for, inferred from its first labels where it is not set.

    Written to the config, as the forward of transformers models does: pipelines read it there.
    """
    if config.problem_type is None:
        if config.num_labels == 1:
            config.problem_type = "regression"
        elif labels.dtype in (torch.long, torch.int):
            config.problem_type = "single_label_classification"
        else:
            config.problem_type = "multi_label_classification"
    return config.problem_type


def _classification(model: Any, batch: Batch) -> Task:
    return {
        "single_label_classification": labelled.SINGLE_LABEL,
        "multi_label_classification": labelled.MULTI_LABEL,
        "regression": labelled.REGRESSION,
    }[problem_type_(model.config, batch["labels"])]


def _always(task: Task) -> Callable[[Any, Batch], Task]:
    return lambda model, batch: task


def _ctc(model: Any, batch: Batch) -> Task:
    config = model.config
    return Ctc(
        lengths=model._get_feat_extract_output_lengths,
        blank=config.pad_token_id,
        per_letter=config.ctc_loss_reduction == "mean",
        zero_infinity=config.ctc_zero_infinity,
    )


def _names(mapping: Mapping[str, Any], without: Iterable[str] = ()) -> frozenset[str]:
    flat: set[str] = set()
    for names in mapping.values():
        flat.update([names] if isinstance(names, str) else names)
    return frozenset(flat.difference(without))


# transformers lists these as causal LMs, but their own losses do not shift the labels.
_UNSHIFTED = (
    *("BartForCausalLM", "BigBirdPegasusForCausalLM", "BlenderbotForCausalLM"),
    *("BlenderbotSmallForCausalLM", "CpmAntForCausalLM", "MBartForCausalLM", "MarianForCausalLM"),
    *("MusicgenForCausalLM", "MusicgenMelodyForCausalLM", "MvpForCausalLM", "PLBartForCausalLM"),
    *("PegasusForCausalLM", "ProphetNetForCausalLM", "TrOCRForCausalLM", "WhisperForCausalLM"),
    *("XLMWithLMHeadModel", "XLNetLMHeadModel"),
)
# Their own losses have further terms, or other labels.
_OTHER_LOSSES = (
    *("BrosForTokenClassification", "DeiTForImageClassificationWithTeacher"),
    *("DiaForConditionalGeneration", "LevitForImageClassificationWithTeacher"),
    *("LxmertForQuestionAnswering", "NllbMoeForConditionalGeneration"),
    *("ProphetNetForConditionalGeneration", "ShieldGemma2ForImageClassification"),
    "SwitchTransformersForConditionalGeneration",
)

HEADS = (
    Head(
        name="sequence classification",
        auto_class=transformers.AutoModelForSequenceClassification,
        class_names=_names(auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES),
        task=_classification,
        predicts_labels=True,
        reads_text=True,
    ),
    Head(
        name="token classification",
        auto_class=transformers.AutoModelForTokenClassification,
        class_names=_names(auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES, _OTHER_LOSSES),
        task=_always(labelled.TOKENS),
        predicts_labels=True,
        reads_text=True,
    ),
    Head(
        name="question answering",
        auto_class=transformers.AutoModelForQuestionAnswering,
        class_names=_names(auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES, _OTHER_LOSSES),
        task=_always(SPANS),
        labels=POSITIONS,
        reads_text=True,
    ),
    Head(
        name="multiple choice",
        auto_class=transformers.AutoModelForMultipleChoice,
        class_names=_names(auto.MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES),
        task=_always(labelled.CHOICES),
        reads_text=True,
    ),
    Head(
        name="causal language modelling",
        auto_class=transformers.AutoModelForCausalLM,
        class_names=_names(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, _UNSHIFTED),
        task=_always(labelled.CAUSAL_LM),
        reads_text=True,
        writes_text=True,
    ),
    # Before masked language modelling, which lists BART too.
    Head(
        name="sequence-to-sequence language modelling",
        auto_class=transformers.AutoModelForSeq2SeqLM,
        class_names=_names(auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, _OTHER_LOSSES),
        task=_always(labelled.SEQ2SEQ),
        # transformers lists decoders that read sound too.
        fits=lambda model: model.config.is_encoder_decoder,
        same=("decoder_start_token_id",),
        makes_decoder_inputs=True,
        reads_text=True,
        writes_text=True,
    ),
    Head(
        name="speech sequence-to-sequence",
        auto_class=transformers.AutoModelForSpeechSeq2Seq,
        class_names=_names(auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES, _OTHER_LOSSES),
        task=_always(labelled.SEQ2SEQ),
        fits=lambda model: model.config.is_encoder_decoder,
        same=("decoder_start_token_id",),
        makes_decoder_inputs=True,
        writes_text=True,
    ),
    Head(
        name="masked language modelling",
        auto_class=transformers.AutoModelForMaskedLM,
        class_names=_names(auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
        task=_always(labelled.MASKED_LM),
        reads_text=True,
        writes_text=True,
    ),
    Head(
        name="image classification",
        auto_class=transformers.AutoModelForImageClassification,
        class_names=_names(auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES, _OTHER_LOSSES),
        task=_classification,
        predicts_labels=True,
    ),
    Head(
        name="audio classification",
        auto_class=transformers.AutoModelForAudioClassification,
        class_names=_names(auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES),
        task=_classification,
        predicts_labels=True,
    ),
    Head(
        name="connectionist temporal classification",
        auto_class=transformers.AutoModelForCTC,
        class_names=_names(auto.MODEL_FOR_CTC_MAPPING_NAMES),
        task=_ctc,
        fits=lambda model: hasattr(model, "_get_feat_extract_output_lengths"),
        same=("pad_token_id",),
        writes_text=True,
    ),
)
