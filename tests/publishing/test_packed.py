import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import tiny_bert, tiny_llama
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
)

from hf_compress import quantized
from hf_compress.publishing.packed import PACKED, load_packed, read_packed, save_packed

IDS = torch.arange(5, 17)[None]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def sparse(model, sparsity=0.5):
    for name, weight in model.named_parameters():
        if weight.dim() == 2 and "embed" not in name:
            weight.data[weight.abs() < weight.abs().float().quantile(sparsity)] = 0
    return model


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def write(folder, tensors):
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text("{}")
    return folder


@DTYPES
@pytest.mark.parametrize(
    ("auto_class", "build"),
    [
        (AutoModelForCausalLM, lambda: tiny_llama(tie_word_embeddings=True)),
        (AutoModelForSequenceClassification, tiny_bert),
        (BertForSequenceClassification, tiny_bert),
    ],
    ids=["tied llama", "bert", "class"],
)
def test_a_model_comes_back_as_it_was(auto_class, build, dtype, tmp_path):
    model = sparse(build()).to(dtype)
    model.save_pretrained(tmp_path / "dense")
    save_packed(tmp_path / "dense", tmp_path / "packed")
    plain = auto_class.from_pretrained(tmp_path / "dense")
    again = load_packed(tmp_path / "packed", auto_class)
    assert type(again) is type(plain)
    assert again.dtype == dtype
    assert not again.training
    assert again.name_or_path == str(tmp_path / "packed")
    again.config.name_or_path = plain.config.name_or_path
    assert again.config.to_dict() == plain.config.to_dict()
    for name, tensor in plain.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
    torch.testing.assert_close(logits(again), logits(plain))
    if model.can_generate():
        assert again.generation_config == plain.generation_config
        assert again.lm_head.weight is again.model.embed_tokens.weight
    again.save_pretrained(tmp_path / "again")
    dense = load_file(tmp_path / "dense" / "model.safetensors")
    redone = load_file(tmp_path / "again" / "model.safetensors")
    assert dense.keys() == redone.keys()
    assert all(torch.equal(dense[name], redone[name]) for name in dense)


@DTYPES
def test_every_bit_of_every_number_comes_back(dtype, tmp_path):
    integer = torch.int32 if dtype.itemsize == 4 else torch.int16
    tensors = {
        f"n{size}": torch.randn(size) * (torch.rand(size) < 0.3) for size in (0, 1, 7, 8, 9, 1001)
    }
    tensors["special"] = torch.tensor(
        [0.0, -0.0, float("nan"), float("inf"), -float("inf")] + 40 * [0.0]
    )
    tensors["scalar"] = torch.tensor(0.0)
    tensors["zeros"] = torch.zeros(3, 5, 7)
    tensors["cube"] = torch.randn(4, 6, 10).relu()
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    tensors["ids"] = torch.tensor([0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 0])
    tensors["flags"] = torch.tensor([False, True, True])
    save_packed(write(tmp_path / "dense", tensors), tmp_path / "packed")
    found = dict(read_packed(tmp_path / "packed"))
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        if tensor.dtype == dtype:
            assert torch.equal(found[name].view(integer), tensor.view(integer)), name
        else:
            assert torch.equal(found[name], tensor)


def test_the_size_is_that_of_bits_and_values(tmp_path):
    half = torch.randn(512, 1024).to(torch.bfloat16)
    half[:, ::2] = 0
    dense = torch.randn(100, 100).to(torch.bfloat16)
    source = write(tmp_path / "dense", {"half": half, "dense": dense})
    sizes = save_packed(source, tmp_path / "packed")
    file = tmp_path / "packed" / PACKED
    assert sizes.dense == (source / "model.safetensors").stat().st_size
    assert sizes.packed == file.stat().st_size
    # A bit and half of two bytes for each weight: 56.25 %.
    header = int.from_bytes(file.read_bytes()[:8], "little")
    assert sizes.packed == 8 + header + half.numel() // 8 + half.numel() + 2 * dense.numel()
    with safe_open(file, framework="pt") as stored:
        assert set(stored.keys()) == {"half.bitmask", "half.values", "dense"}


def test_hand_computed_bits(tmp_path):
    weight = torch.tensor([[0.0, 1.5, 0.0, 0.0, 2.5], [0.0, 0.0, 0.0, 0.0, 3.5]])
    save_packed(write(tmp_path / "dense", {"w": weight}), tmp_path / "packed")
    stored = load_file(tmp_path / "packed" / PACKED)
    assert stored["w.bitmask"].tolist() == [0b00010010, 0b00000010]
    assert stored["w.values"].tolist() == [1.5, 2.5, 3.5]


def test_shards_become_one_file(tmp_path):
    model = sparse(tiny_llama())
    model.save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    assert len(list((tmp_path / "dense").glob("*.safetensors"))) > 2
    save_packed(tmp_path / "dense", tmp_path / "packed")
    assert [path.name for path in (tmp_path / "packed").glob("*safetensors*")] == [PACKED]
    assert torch.equal(logits(load_packed(tmp_path / "packed", AutoModelForCausalLM)), logits(model))


def test_without_this_package_it_fails_instead_of_loading_random_weights(tmp_path):
    sparse(tiny_bert()).save_pretrained(tmp_path / "dense")
    save_packed(tmp_path / "dense", tmp_path / "packed")
    with pytest.raises(OSError, match=r"model\.safetensors"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "packed")
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert config == json.loads((tmp_path / "dense" / "config.json").read_text())


def test_the_card_says_first_how_to_load(tmp_path):
    source = tmp_path / "dense"
    sparse(tiny_bert()).save_pretrained(source)
    (source / "README.md").write_text("---\nlicense: mit\n---\n\n# Model\n\nWords.\n")
    (source / "pictures").mkdir()
    (source / "pictures" / "curve.svg").write_text("<svg/>")
    sizes = save_packed(source, tmp_path / "packed")
    card = (tmp_path / "packed" / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n---\n\n> **Packed weights.**")
    assert f"{100 * sizes.packed / sizes.dense:.0f} %" in card
    assert "load_packed(folder, BertForSequenceClassification)" in card
    assert card.endswith("# Model\n\nWords.\n")
    assert (tmp_path / "packed" / "pictures" / "curve.svg").is_file()
    (source / "README.md").unlink()
    save_packed(source, tmp_path / "other")
    assert (tmp_path / "other" / "README.md").read_text().startswith("> **Packed weights.**")


@pytest.fixture
def packed(tmp_path):
    sparse(tiny_bert()).save_pretrained(tmp_path / "dense")
    save_packed(tmp_path / "dense", tmp_path / "packed")
    return tmp_path / "packed"


def rewritten(folder, change):
    """The packed file with its tensors changed, and its list of shapes kept."""
    with safe_open(folder / PACKED, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(folder / PACKED)
    change(tensors)
    save_file(tensors, folder / PACKED, metadata=metadata)


WEIGHT = "bert.encoder.layer.0.output.dense.weight"


def a_bit_less(tensors):
    mask = tensors[f"{WEIGHT}.bitmask"]
    place = int(mask.nonzero()[0])
    mask[place] &= mask[place] - 1


def a_value_less(tensors):
    tensors[f"{WEIGHT}.values"] = tensors[f"{WEIGHT}.values"][:-1].clone()


def a_shorter_mask(tensors):
    tensors[f"{WEIGHT}.bitmask"] = tensors[f"{WEIGHT}.bitmask"][:-1].clone()


def no_values(tensors):
    del tensors[f"{WEIGHT}.values"]


@pytest.mark.parametrize("change", [a_bit_less, a_value_less, a_shorter_mask, no_values])
def test_damaged_parts_are_refused(packed, change):
    rewritten(packed, change)
    with pytest.raises(ValueError, match="damaged") as error:
        load_packed(packed, AutoModelForSequenceClassification)
    assert WEIGHT in str(error.value)


def test_a_truncated_file_is_refused(packed):
    whole = (packed / PACKED).read_bytes()
    for length in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        (packed / PACKED).write_bytes(whole[:length])
        with pytest.raises(ValueError, match="damaged"):
            load_packed(packed, AutoModelForSequenceClassification)


def test_wrong_folders_are_refused(packed, tmp_path):
    dense = tmp_path / "dense"
    with pytest.raises(FileNotFoundError, match="from_pretrained"):
        load_packed(dense, AutoModelForSequenceClassification)
    with pytest.raises(FileNotFoundError, match="save_pretrained"):
        save_packed(packed, tmp_path / "twice")
    with pytest.raises(FileExistsError, match="not empty"):
        save_packed(dense, packed)
    shutil.copy(dense / "model.safetensors", packed / PACKED)
    with pytest.raises(ValueError, match="not written by `save_packed`"):
        load_packed(packed, AutoModelForSequenceClassification)
    (dense / "model.safetensors").write_bytes(b"1234")
    with pytest.raises(ValueError, match="damaged"):
        save_packed(dense, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_model_is_told_that_its_folder_is_meant(tmp_path):
    with pytest.raises(TypeError, match="is a LlamaForCausalLM: save it.*and pass the folder"):
        save_packed(tiny_llama(), tmp_path)


def test_quantized_models_are_refused(tmp_path):
    pytest.importorskip("bitsandbytes")
    tiny_llama(hidden=64).save_pretrained(tmp_path / "float")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=quantized(8))
    model.save_pretrained(tmp_path / "int8")
    with pytest.raises(ValueError, match="quantized"):
        save_packed(tmp_path / "int8", tmp_path / "packed")
