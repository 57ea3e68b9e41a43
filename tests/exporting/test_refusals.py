import pytest
import torch
from tiny import tiny_bert, tiny_llama, tiny_t5

from hf_compress.cli.errors import UserError
from hf_compress.cli.export import main
from hf_compress.example_inputs import example_inputs
from hf_compress.exporting import formats
from hf_compress.exporting.export import export_folder
from hf_compress.exporting.loading import load_floats


@pytest.fixture
def installed(monkeypatch):
    """Nothing gets so far that a package would be needed."""
    monkeypatch.setattr(formats.importlib.util, "find_spec", lambda name: object())


def test_a_missing_package_is_named_with_its_extra(monkeypatch, tmp_path):
    monkeypatch.setattr(formats.importlib.util, "find_spec", lambda name: None)
    words = r'needs openvino and nncf: pip install "hf-compress\[export-openvino\]"'
    with pytest.raises(ImportError, match=words):
        export_folder(tmp_path, "openvino")


@pytest.mark.parametrize(
    ("bits", "message"),
    [(4, "`bits` is 4; openvino takes 32 or 8"), (8, "need rows of calibration: pass a dataset")],
)
def test_bits(installed, tmp_path, bits, message):
    inputs = example_inputs(tiny_bert(), batch=2)
    with pytest.raises(ValueError, match=message):
        formats.export(tiny_bert(), "openvino", tmp_path, inputs, tokenizer=tmp_path, bits=bits)


def test_a_folder_without_a_model(installed, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config.json"):
        export_folder(tmp_path, "onnx")


def test_encoder_decoders(installed, tmp_path):
    tiny_t5().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="export as several programs"):
        export_folder(tmp_path, "onnx")


def test_gguf_is_of_decoders_with_a_tokenizer(installed, tmp_path):
    tiny_bert().save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="decoder language models, and BertForSeq"):
        export_folder(tmp_path / "bert", "gguf")
    tiny_llama().save_pretrained(tmp_path / "llama")
    with pytest.raises(ValueError, match="holds the tokenizer, and there is none"):
        export_folder(tmp_path / "llama", "gguf")
    with pytest.raises(ValueError, match="`bits` is 3; gguf takes 8 or 4"):
        export_folder(tmp_path / "llama", "gguf", bits=3)


def test_weights_that_stay_packed(tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForSequenceClassification

    from hf_compress import load_quantized

    tiny_bert(hidden=64).save_pretrained(tmp_path / "dense")
    packed = load_quantized(tmp_path / "dense", 8, AutoModelForSequenceClassification)
    packed.save_pretrained(tmp_path / "packed")
    with pytest.raises(ValueError, match="is packed by bitsandbytes, which no exporter reads"):
        load_floats(tmp_path / "packed")


def test_a_card_that_was_changed_by_hand(published, installed):
    card = published / "README.md"
    card.write_text(card.read_text() + "\nMine.\n")
    with pytest.raises(ValueError, match="was changed by hand"):
        export_folder(published, "onnx")


def test_mistakes_on_the_command_line_are_told_in_a_line(installed, tmp_path):
    tiny_bert().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="`runs` is 0"):
        main(["--format", "onnx", "--model", str(tmp_path), "--runs", "0"])
    with pytest.raises(UserError, match="invalid choice"):
        main(["--format", "tflite", "--model", str(tmp_path)])


def test_the_grids_of_a_file_are_those_it_was_saved_with(tmp_path):
    pytest.importorskip("compressed_tensors")
    from exporting.conftest import on_grids

    for number, scheme in enumerate(
        [{"bits": 4, "group_size": 16}, {"bits": 8}, {"bits": 8, "symmetric": False, "grid": "minmax"}]
    ):
        model, grids = on_grids(tmp_path / str(number), **scheme)
        loaded, found = load_floats(tmp_path / str(number))
        assert found.keys() == grids.keys()
        for name, grid in grids.items():
            torch.testing.assert_close(found[name].scale, grid.scale, rtol=0, atol=0)
            if grid.zero_point is not None:
                assert torch.equal(found[name].zero_point, grid.zero_point)
            assert found[name].bits == grid.bits
            assert torch.equal(loaded.get_parameter(name), model.get_parameter(name))
