"""The integers of a training in GGUF, as the package of that format reads them."""

import numpy as np
import pytest
import torch
from tiny import tiny_llama

from hf_compress import quantize_oneshot_
from hf_compress.exporting.gguf_blocks import fits, write_codes

gguf = pytest.importorskip("gguf")

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def in_pairs(weight, heads):
    """The rows of queries and keys as llama.cpp has them: what turns together side by side."""
    rows = []
    for head in weight.split(len(weight) // heads):
        first, second = head.chunk(2)
        rows += [row for pair in zip(first, second, strict=True) for row in pair]
    return torch.stack(rows)


def as_stored(name, weight):
    heads = {"self_attn.q_proj": 4, "self_attn.k_proj": 2}.get(name)
    return in_pairs(weight, heads) if heads else weight


def converted(file, model, kind, *, rows=as_stored):
    """What a converter writes, which finds scales of its own."""
    kind = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(file, "llama")
    for layer in range(2):
        for name, short in NAMES.items():
            weight = model.get_parameter(f"model.layers.{layer}.{name}.weight").detach()
            blocks = gguf.quantize(rows(name, weight).contiguous().numpy(), kind)
            writer.add_tensor(f"blk.{layer}.{short}.weight", blocks, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("scheme", "kind"),
    [
        ({"bits": 4, "group_size": 32}, "Q4_0"),
        ({"bits": 4, "group_size": 64}, "Q4_0"),
        ({"bits": 4}, "Q4_0"),
        ({"bits": 8}, "Q8_0"),
        ({"bits": 8, "group_size": "tensor"}, "Q8_0"),
    ],
)
def test_the_codes_of_a_training_replace_those_of_a_converter(scheme, kind, tmp_path):
    model, file = tiny_llama(hidden=64), tmp_path / "model.gguf"
    grids = quantize_oneshot_(model, None, **scheme)
    assert fits(model, grids)
    converted(file, model, kind)
    before = file.stat().st_size
    write_codes(file, model, grids, kind)
    assert file.stat().st_size == before
    found = {each.name: each for each in gguf.GGUFReader(file).tensors}
    for layer in range(2):
        for name, short in NAMES.items():
            weight = f"model.layers.{layer}.{name}.weight"
            tensor = found[f"blk.{layer}.{short}.weight"]
            assert tensor.tensor_type.name == kind
            values = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type))
            expected = as_stored(name, model.get_parameter(weight).detach())
            torch.testing.assert_close(values, expected, rtol=2**-10, atol=0)
            # No other rounding would give as many values.
            scales = grids[weight].scale.numel()
            assert len(np.unique(values.numpy())) <= scales * 2 ** scheme["bits"]


@pytest.mark.parametrize(
    "scheme",
    [
        {"bits": 3, "group_size": 32},
        {"bits": 4, "group_size": 16},
        {"bits": 4, "group_size": 32, "symmetric": False, "grid": "minmax"},
    ],
)
def test_grids_that_blocks_do_not_have(scheme):
    model = tiny_llama(hidden=64)
    assert not fits(model, quantize_oneshot_(model, None, **scheme))


def test_what_the_file_has_otherwise_is_refused(tmp_path):
    model, file = tiny_llama(hidden=64), tmp_path / "model.gguf"
    grids = quantize_oneshot_(model, None, bits=8)
    converted(file, model, "Q4_0")
    with pytest.raises(ValueError, match=r"q_proj.weight as Q4_0 where Q8_0 would hold"):
        write_codes(file, model, grids, "Q8_0")
    converted(file, model, "Q8_0", rows=lambda name, weight: weight.flip(0))
    with pytest.raises(ValueError, match="an order of rows that is known"):
        write_codes(file, model, grids, "Q8_0")


def test_scales_beyond_16_bits_are_refused(tmp_path):
    model, file = tiny_llama(hidden=64), tmp_path / "model.gguf"
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1e-5)
    grids = quantize_oneshot_(model, None, bits=8)
    converted(file, model, "Q8_0")
    with pytest.raises(ValueError, match="up_proj.weight"):
        write_codes(file, model, grids, "Q8_0")
