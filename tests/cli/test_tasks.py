"""What `compress` does beside pruning: images, few bits, adapters, and a dense model of its own."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoConfig

from hf_compress.cli.compress import main
from hf_compress.cli.verify import main as verify

RECIPES = Path(__file__).parents[2] / "scripts" / "recipes"


def flags(model, output, **more):
    settings = {
        "model": model,
        "output_dir": str(output),
        "max_train_rows": 64,
        "max_eval_rows": 32,
        "max_length": 16,
        "per_device_train_batch_size": 8,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        **more,
    }
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def holds(folder, *words):
    """Whether each number of the card that was checked is true."""
    with pytest.raises(SystemExit) as ended:
        verify([str(folder), *words])
    return ended.value.code == 0


def report_of(folder):
    return json.loads((folder / "report.json").read_text())


def test_a_vision_model_from_nothing_but_its_config(tmp_path):
    vit = str(RECIPES / "vit-digits")
    words = flags(vit, tmp_path, dataset="digits", task="image-classification", max_steps=6)
    with pytest.raises(ValueError, match="a config and no weights: pass `dense_epochs`"):
        main([*words, "--sparsity", "0.5"])
    bits = ("--bits", "8", "--group_size", "32", "--format", "compressed-tensors")
    main([*words, "--dense_epochs", "1", "--sparsity", "0.5", *bits])
    assert AutoConfig.from_pretrained(tmp_path).id2label[9] == "9"
    report = report_of(tmp_path)
    assert report["base_model"] == {"id": None, "name": "vit-digits", "revision": None}
    assert report["dense_name"].endswith("trained on the same rows, epochs: 1")
    assert report["integers"]["bits"] == 8
    assert report["audit"]["target_sparsity"] >= 0.5
    card = (tmp_path / "README.md").read_text()
    assert "model(**processor(image, return_tensors=" in card
    assert "pipeline_tag: image-classification" in card
    assert holds(tmp_path, "--dense", str(tmp_path / "dense"))


def test_the_dense_model_is_made_first_and_teaches(classifier, tmp_path):
    words = flags(classifier, tmp_path, dataset="reuters-r8", max_steps=4, dense_epochs=1)
    main([*words, "--teacher", "dense", "--teacher_bits", "8", "--student_layers", "2"])
    dense, student = load_file(tmp_path / "dense" / "model.safetensors"), report_of(tmp_path)
    given = load_file(Path(classifier) / "model.safetensors")
    assert any(not given[name].equal(weight) for name, weight in dense.items())
    assert student["structure"] == {"num_hidden_layers": {"dense": 4, "compressed": 2}}
    assert student["recipe"]["distillation"]["teacher's precision"] == "8 bit"
    # The card's dense model is the teacher as it was fine-tuned, and not in its 8 bits.
    assert student["dense"]["parameters"] == sum(weight.numel() for weight in dense.values())


def test_adapters_on_a_base_in_four_bit(language_model, texts, tmp_path):
    pytest.importorskip("bitsandbytes")
    words = flags(language_model, tmp_path, dataset=texts, task="causal-lm", max_steps=4)
    base = ("--base_model", "org/base")
    main([*words, *base, "--load_bits", "4", "--lora_rank", "4"])
    written = {file.name for file in tmp_path.glob("*.safetensors")}
    assert written == {"adapter_model.safetensors"}
    report = report_of(tmp_path)
    assert report["adapters"]["r"] == 4
    assert report["quantized"] == 4
    assert holds(tmp_path, "--base", language_model, "--data", texts)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--load_bits", "4", "--sparsity", "0.5"), "`sparsity` has nothing to train"),
        (("--load_bits", "4", "--bits", "8"), "`bits` has nothing to train"),
        (("--load_bits", "4", "--task", "image-classification"), "for images and sound pass `bits`"),
        (("--bits", "1"), "`bits`"),
        (("--group_size", "32", "--sparsity", "0.5"), "`group_size` is there, but no `bits`"),
        (("--format", "torchao", "--sparsity", "0.5"), "`format` is there, but no `bits`"),
        (("--teacher", "dense", "--sparsity", "0.5"), "but no `dense_epochs`"),
        (("--sparsity", "0.5", "--model", "all-minilm"), "'all-minilm' cannot be loaded"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path, words, message):
    with pytest.raises(ValueError, match=message):
        main([*flags("no/model", tmp_path, dataset="reuters-r8"), *words])
