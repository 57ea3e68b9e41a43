"""Which layers are the head of a model: by the names of their kind, and in the model itself."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

# What transformers calls its task heads: each entry also means names that end in it, and children.
# "$" keeps a name from meaning children (`decoder` is the head of ModernBERT and half of T5), and
# "\b" from being an ending (`head` is that of ModernBERT too, and `q_head` an attention of Funnel).
HEADS = (
    "lm_head",
    "lm_heads",
    "generator_lm_head",
    "proj_out",
    "embed_out",
    "lm_loss",
    "cls",
    r".*\.cls\.predictions",
    "predictions",
    "generator_predictions",
    "discriminator_predictions",
    "entity_predictions",
    "lm_predictions",
    "pred_layer",
    "vocab_transform",
    "vocab_projector",
    r"head\b",
    "decoder$",
    "dense$",
    "fc$",
    "output$",
    "proj$",
    "classifier",
    "pre_classifier",
    "class_labels_classifier",
    "bbox_predictor",
    "decode_head",
    "classification_head",
    "score",
    "qa_outputs",
    "qa_classifier",
    "splinter_qass",
    "sequence_summary",
    "logits_proj",
    "output_projection",
    "answer_head",
    "obj_predict_head",
    "projector",
    "project_hid",
    "project_q",
    "tdnn",
    "feature_extractor",
    "speech_decoder_postnet",
    "pooler",
    "class_predictor",
    "mask_embedder",
    "class_embed",
    "bbox_embed",
    "class_head",
    "box_head",
    "ctc_head",
    "dist_head",
    "eos_head",
    "itm_head",
    "projection_head",
    "logits_dense",
    "unembedding_projection",
    "embedding_proj_layer",
    "text_projection",
    "visual_projection",
    "vision_projection",
    "language_projection",
    "horizon_ff_layer",
    "output_projection_point",
    "output_projection_quantiles",
    "action_out_proj",
    r".*\.readout_projects",
)


def linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Linear | Conv1D]]:
    """Names and modules of the layers of `model` that bitsandbytes has a format for."""
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            yield name, module


def head_layers(model: PreTrainedModel) -> list[str]:
    """Names of the linear layers of `model` outside its backbone, of its output, and tied ones."""
    backbone = set(model.base_model.modules())
    output = model.get_output_embeddings()
    embedded = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return [
        name
        for name, layer in linear_layers(model)
        # Some classes, T5ForQuestionAnswering among them, are their own backbone.
        if layer not in backbone or "." not in name or layer is output or id(layer.weight) in embedded
    ]
