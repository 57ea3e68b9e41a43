"""The architectures whose structure can be removed: a table of the names of their modules.

A table rather than a trace of the graph (as Torch-Pruning makes): what limits removal is which sizes
the stock config can express and which layers must agree, and no trace knows that. A new architecture
is a row here, and a row in the tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

Kind = Literal["ffn", "heads", "experts", "hidden", "layers"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True, kw_only=True)
class Wiring:
    """Units within a layer: the modules that write them, the one that reads them, and the config
    fields that count them (the smallest is the number of units: key-value groups come whole).

    For experts the reader is the router. aligned: the same units in all layers of the stack.
    """

    fields: tuple[str, ...]
    writers: tuple[str, ...]
    reader: str
    aligned: bool = False


@dataclass(frozen=True, kw_only=True)
class Stack:
    """Equal layers in a row: the path of their list, and the config field that counts them.

    mask: the entry of a batch that tells tokens from padding; None where there is no padding.
    pinned: a module that only the first layer has, whichever layer that is.
    """

    layers: str
    depth: str
    mask: str | None = "attention_mask"
    ffn: tuple[Wiring, ...] = ()
    heads: tuple[Wiring, ...] = ()
    experts: tuple[Wiring, ...] = ()
    pinned: str | None = None


@dataclass(frozen=True, kw_only=True)
class Hidden:
    """Features of the residual stream, which RMSNorms alone read: config fields of their number and
    of the norms' epsilon.

    heads: the field from which the size of a head follows where `head_dim` does not say it; None
        where another field always does.
    divided: the norm whose output the head divides by the root of the number, under
        `scale_decoder_outputs`.
    """

    size: str
    epsilon: str
    heads: str | None = None
    divided: str | None = None


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The stacks of a model type, from its backbone; and why a kind of unit cannot be removed."""

    stacks: tuple[Stack, ...]
    hidden: Hidden | None = None
    cannot: dict[str, str] = field(default_factory=dict)


def _ffn(size: str, writers: Sequence[str], reader: str) -> tuple[Wiring, ...]:
    return (Wiring(fields=(size,), writers=tuple(writers), reader=reader),)


_CENTRED = {"hidden": "its LayerNorms subtract the mean of all features, which is another without some"}
_DERIVED = {
    "heads": "its head size is hidden size / number of heads, so fewer heads become wider ones",
    "hidden": f"{_CENTRED['hidden']}, and its head size is hidden size / number of heads",
}
_ONLY_EXPERTS = {"ffn": "its feed-forward layers are experts, of which it can lose whole ones"}

_GROUPED_HEADS = (
    Wiring(
        fields=("num_attention_heads", "num_key_value_heads"),
        writers=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        reader="self_attn.o_proj",
    ),
)

_RMS = Hidden(size="hidden_size", epsilon="rms_norm_eps", heads="num_attention_heads")

_BERT = Architecture(
    stacks=(
        Stack(
            layers="encoder.layer",
            depth="num_hidden_layers",
            ffn=_ffn("intermediate_size", ["intermediate.dense"], "output.dense"),
        ),
    ),
    cannot=_DERIVED,
)

_LLAMA = Architecture(
    stacks=(
        Stack(
            layers="layers",
            depth="num_hidden_layers",
            ffn=_ffn("intermediate_size", ["mlp.gate_proj", "mlp.up_proj"], "mlp.down_proj"),
            heads=_GROUPED_HEADS,
        ),
    ),
    hidden=_RMS,
)


def _mixture(field: str) -> Architecture:
    experts = (Wiring(fields=(field,), writers=("mlp.experts",), reader="mlp.gate"),)
    stack = Stack(layers="layers", depth="num_hidden_layers", heads=_GROUPED_HEADS, experts=experts)
    return Architecture(stacks=(stack,), hidden=_RMS, cannot=_ONLY_EXPERTS)


def _t5_attention(path: str, *, aligned: bool) -> Wiring:
    # The first layer's position bias is added to every layer's scores: head h is one head in all.
    writers = [f"{path}.{name}" for name in ("q", "k", "v", *(["relative_attention_bias"] * aligned))]
    return Wiring(fields=("num_heads",), writers=tuple(writers), reader=f"{path}.o", aligned=aligned)


def _t5_ffn(path: str) -> tuple[Wiring, ...]:
    path = f"{path}.DenseReluDense"
    return _ffn("d_ff", [f"{path}.wi", f"{path}.wi_0", f"{path}.wi_1"], f"{path}.wo")


_T5 = Architecture(
    stacks=(
        Stack(
            layers="encoder.block",
            depth="num_layers",
            ffn=_t5_ffn("layer.1"),
            heads=(_t5_attention("layer.0.SelfAttention", aligned=True),),
            pinned="layer.0.SelfAttention.relative_attention_bias",
        ),
        Stack(
            layers="decoder.block",
            depth="num_decoder_layers",
            mask="decoder_attention_mask",
            ffn=_t5_ffn("layer.2"),
            heads=(
                _t5_attention("layer.0.SelfAttention", aligned=True),
                _t5_attention("layer.1.EncDecAttention", aligned=False),
            ),
            pinned="layer.0.SelfAttention.relative_attention_bias",
        ),
    ),
    hidden=Hidden(size="d_model", epsilon="layer_norm_epsilon", divided="decoder.final_layer_norm"),
)

ARCHITECTURES: dict[str, Architecture] = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "distilbert": Architecture(
        stacks=(
            Stack(
                layers="transformer.layer",
                depth="n_layers",
                ffn=_ffn("hidden_dim", ["ffn.lin1"], "ffn.lin2"),
            ),
        ),
        cannot=_DERIVED,
    ),
    "gpt2": Architecture(
        stacks=(Stack(layers="h", depth="n_layer", ffn=_ffn("n_inner", ["mlp.c_fc"], "mlp.c_proj")),),
        cannot=_DERIVED,
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "mixtral": _mixture("num_local_experts"),
    "qwen2_moe": _mixture("num_experts"),
    "qwen3_moe": _mixture("num_experts"),
    "t5": _T5,
    "mt5": _T5,
    "vit": Architecture(
        stacks=(
            Stack(
                layers="layers",
                depth="num_hidden_layers",
                mask=None,
                ffn=_ffn("intermediate_size", ["mlp.fc1"], "mlp.fc2"),
                heads=(
                    Wiring(
                        fields=("num_attention_heads",),
                        writers=("attention.q_proj", "attention.k_proj", "attention.v_proj"),
                        reader="attention.o_proj",
                    ),
                ),
            ),
        ),
        cannot=_CENTRED,
    ),
    "wav2vec2": Architecture(
        stacks=(
            Stack(
                layers="encoder.layers",
                depth="num_hidden_layers",
                mask=None,  # that of a batch is of samples, not of the frames that layers see
                ffn=_ffn(
                    "intermediate_size",
                    ["feed_forward.intermediate_dense"],
                    "feed_forward.output_dense",
                ),
            ),
        ),
        cannot=_DERIVED,
    ),
    "whisper": Architecture(
        stacks=(
            Stack(
                layers="encoder.layers",
                depth="encoder_layers",
                mask=None,
                ffn=_ffn("encoder_ffn_dim", ["fc1"], "fc2"),
            ),
            Stack(
                layers="decoder.layers",
                depth="decoder_layers",
                mask="decoder_attention_mask",
                ffn=_ffn("decoder_ffn_dim", ["fc1"], "fc2"),
            ),
        ),
        cannot=_DERIVED,
    ),
}
