import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_bert, tiny_llama

from hf_compress.measure import count_weights
from hf_compress.publishing.audit import INDEX, audit


def prune(model, fraction):
    """Zeroes the first `fraction` of each weight of the attention, and returns their names."""
    names = []
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ("attention" in name or "self_attn" in name) and weight.dim() == 2:
                weight.view(-1)[: round(fraction * weight.numel())] = 0
                names.append(name)
    return names


@pytest.mark.parametrize("shards", ["10GB", "20KB"], ids=["one file", "several files"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_files_are_counted_as_the_model(shards, tied, tmp_path):
    model = tiny_llama(tie_word_embeddings=tied)
    names = prune(model, 0.75)
    model.save_pretrained(tmp_path, max_shard_size=shards)
    found = audit(tmp_path, targets=names)
    assert (len(found.files) > 1) == (shards == "20KB")
    weights = count_weights(model)
    assert (found.parameters, found.nonzeros) == (weights.parameters, weights.nonzeros)
    assert found.target_sparsity == 0.75
    assert found.sparsity == pytest.approx(1 - weights.nonzeros / weights.parameters)
    tensor = found.tensors[names[0]]
    assert (tensor.shape, tensor.dtype, tensor.sparsity) == ((32, 32), "float32", 0.75)
    assert tensor.bytes == 4 * 32 * 32
    assert found.file_bytes == sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    json.dumps(found.to_dict())


@pytest.mark.parametrize("at_once", [1, 500, 5000])
def test_in_pieces_it_is_the_same(at_once, tmp_path, monkeypatch):
    model = tiny_llama(tie_word_embeddings=True)
    prune(model, 0.75)
    tensors = {"a.scalar": torch.tensor(0.0), "b.empty": torch.empty(0, 3), "c": torch.eye(7) > 0}
    tensors |= model.state_dict() | {"z.half": torch.eye(9, dtype=torch.bfloat16)}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    model.config.save_pretrained(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    whole = audit(tmp_path)
    monkeypatch.setattr("hf_compress.publishing.audit._AT_ONCE", at_once)
    assert audit(tmp_path) == whole
    assert whole.tied
    for name, tensor in tensors.items():
        found = whole.tensors[name]
        zeros = int((tensor == 0).sum())
        assert (found.shape, found.zeros, found.bytes) == (tuple(tensor.shape), zeros, tensor.nbytes)


def test_a_second_copy_of_a_tied_tensor_counts_once(tmp_path):
    model = tiny_llama(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    found = audit(tmp_path)
    assert found.tied == {"model.embed_tokens.weight": "lm_head.weight"}
    assert found.parameters == count_weights(model).parameters


def test_layers_that_happen_to_be_equal_are_not_tied(tmp_path):
    model = tiny_llama(tie_word_embeddings=True)
    model.model.layers[1].load_state_dict(model.model.layers[0].state_dict())
    model.save_pretrained(tmp_path)
    assert audit(tmp_path).parameters == count_weights(model).parameters


def test_a_file_that_is_denser_than_claimed_is_refused(tmp_path):
    model = tiny_bert()
    names = prune(model, 0.5)
    with torch.no_grad():
        model.get_parameter(names[2])[0, 0] = 1.0
    model.save_pretrained(tmp_path)
    found = audit(tmp_path, targets=names)
    found.check([name for name in names if name != names[2]], 0.5)
    with pytest.raises(ValueError, match=f"denser than asked.*{names[2]}"):
        found.check(names, 0.5)
    found.check(names, found.sparsity_of(names))
    with pytest.raises(ValueError, match="No tensors"):
        found.check([], 0.5)


def test_negative_zero_and_eight_bit_floats_are_counted(tmp_path):
    weight = torch.tensor([[0.0, -0.0], [1.0, -2.0]])
    tensors = {
        "half": weight.half(),
        "eight": weight.to(torch.float8_e4m3fn),
        "int": weight.to(torch.int8),
        "tiny": weight.bfloat16() * 1e-30,
    }
    save_file(tensors, tmp_path / "model.safetensors")
    found = audit(tmp_path)
    assert {name: tensor.zeros for name, tensor in found.tensors.items()} == dict.fromkeys(tensors, 2)
    assert found.tensors["eight"].dtype == "float8_e4m3fn"
    assert found.tensors["half"].bytes == 8


def shard(folder):
    tiny_bert().save_pretrained(folder, max_shard_size="20KB")
    return sorted(folder.glob("*.safetensors"))


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="has neither"):
        audit(tmp_path)
    file = shard(tmp_path)[1]
    file.unlink()
    with pytest.raises(FileNotFoundError, match=file.name):
        audit(tmp_path)


def test_damaged_files_are_named(tmp_path):
    file = shard(tmp_path)[1]
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=f"{file.name} is damaged"):
        audit(tmp_path)
    (tmp_path / INDEX).write_text("{")
    with pytest.raises(ValueError, match="json is damaged"):
        audit(tmp_path)


def test_an_index_that_does_not_match_is_refused(tmp_path):
    shard(tmp_path)
    index = json.loads((tmp_path / INDEX).read_text())
    added = {
        "weight_map": {**index["weight_map"], "extra.weight": next(iter(index["weight_map"].values()))}
    }
    (tmp_path / INDEX).write_text(json.dumps(added))
    with pytest.raises(ValueError, match="lacks 1 tensors of its index: .*extra.weight"):
        audit(tmp_path)
    first, *_, last = sorted(set(index["weight_map"].values()))
    moved = {name: first if file == last else file for name, file in index["weight_map"].items()}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": moved | {"x": last}}))
    with pytest.raises(ValueError, match="belongs to another file"):
        audit(tmp_path)


def test_unknown_targets_are_refused(tmp_path):
    tiny_bert().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks 1 targets, \['nowhere.weight'\]"):
        audit(tmp_path, targets=["nowhere.weight", "classifier.weight"])
