"""`choose`, from rows to a published winner, of what is no classifier of texts: images, raw sound,
spectrograms, and language models. `compress` of sound too."""

import json

import pytest
import yaml
from datasets import Dataset, load_from_disk
from tiny import tiny_vit, tiny_wav2vec2
from transformers import (
    AutoConfig,
    ViTImageProcessor,
    Wav2Vec2FeatureExtractor,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForAudioClassification,
)

from hf_compress.cli.choose import main
from hf_compress.cli.compress import main as compress
from hf_compress.cli.errors import UserError
from hf_compress.cli.verify import main as verify
from hf_compress.publishing.validate import validate
from hf_compress.samples import corpus


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """Folder of 60 spoken digits."""
    pytest.importorskip("espeakng_loader")
    from hf_compress.spoken_digits import WORDS, _rows, _synthesizer

    rows = list(_rows(_synthesizer(), ["m1", "f1"]))[:60]
    folder = tmp_path_factory.mktemp("sound") / "rows"
    Dataset.from_list(rows).save_to_disk(folder)
    assert {row["label"] for row in load_from_disk(folder)} == set(WORDS)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of untrained models with their processors."""
    folder = tmp_path_factory.mktemp("models")
    vit = tiny_vit(num_labels=10)
    vit.save_pretrained(folder / "vit")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder / "vit")
    tiny_wav2vec2(layers=3).save_pretrained(folder / "wav2vec2")
    Wav2Vec2FeatureExtractor().save_pretrained(folder / "wav2vec2")
    whisper = WhisperConfig(
        vocab_size=4,
        d_model=32,
        encoder_layers=2,
        decoder_layers=1,
        encoder_attention_heads=2,
        encoder_ffn_dim=64,
        max_source_positions=50,
        num_mel_bins=16,
        classifier_proj_size=16,
        pad_token_id=0,
    )
    WhisperForAudioClassification(whisper).save_pretrained(folder / "whisper")
    WhisperFeatureExtractor(feature_size=16, chunk_length=1).save_pretrained(folder / "whisper")
    return folder


def words(model, dataset, output, **more):
    settings = {
        "model": model,
        "dataset": dataset,
        "output_dir": output,
        "per_device_train_batch_size": 8,
        "use_cpu": True,
        "max_length": 24,
    } | more
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def chosen(model, dataset, output, space, **more):
    """The winner's report, of a search that may lose anything and prefers the smallest."""
    (output / "space.yaml").write_text(yaml.safe_dump(space))
    settings = {"space": output / "space.yaml", "max_drop": 10_000, "max_steps": 4, "finalists": 1}
    main(words(model, dataset, output / "out", **settings | more))
    validate(output / "out" / "winner")
    found = json.loads((output / "out" / "choice.json").read_text())
    sizes = {each["name"]: each["predicted"]["bytes"] for each in found["tried"]}
    assert found["winner"] == min(sizes, key=sizes.get)
    return json.loads((output / "out" / "winner" / "report.json").read_text())


def holds(folder, *flags):
    with pytest.raises(SystemExit) as ended:
        verify([str(folder), *flags])
    return ended.value.code == 0


def test_images(models, tmp_path):
    report = chosen(
        *(models / "vit", "digits", tmp_path, {"layers": [None, 1], "heads": 0.5}),
        **{"task": "image-classification", "max_train_rows": 40, "max_eval_rows": 20},
    )
    winner = tmp_path / "out" / "winner"
    assert report["choice"]["sentence"].startswith("1layers-heads0.5 ")
    assert AutoConfig.from_pretrained(winner).num_attention_heads == 2
    assert report["compressed"]["latency"]["inputs"]["pixel_values"] == [1, 3, 16, 16]
    assert "# of a PIL image" in (winner / "README.md").read_text()
    assert holds(winner)


@pytest.mark.parametrize("model", ["wav2vec2", "whisper"])
def test_sound(model, models, sound, tmp_path):
    report = chosen(
        *(models / model, sound, tmp_path, {"layers": 1, "ffn": [0, 0.5], "bits": [None, 8]}),
        **{"task": "audio-classification", "max_seconds": 0.25},
    )
    winner = tmp_path / "out" / "winner"
    assert report["choice"]["sentence"].startswith("1layers-ffn0.5-8bit ")
    shapes = report["compressed"]["latency"]["inputs"]
    # Raw sound is cut; a spectrogram has the size that the model is for.
    expected = {"wav2vec2": [1, 4000], "whisper": [1, 16, 100]}[model]
    assert next(iter(shapes.values())) == expected
    assert "extractor(samples, sampling_rate=rate" in (winner / "README.md").read_text()
    assert holds(winner, "--data", str(sound))


def test_compress_on_sound_makes_the_dense_model_first(models, sound, tmp_path):
    flags = words(models / "wav2vec2", sound, tmp_path, task="audio-classification", max_seconds=0.25)
    compress([*flags, "--max_steps", "3", "--dense_epochs", "1", "--sparsity", "0.5"])
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["pipeline_tag"] == "audio-classification"
    assert report["audit"]["target_sparsity"] == pytest.approx(0.5, abs=1e-3)
    assert report["evaluation"]["max_seconds"] == 0.25
    assert holds(tmp_path, "--data", str(sound), "--dense", str(tmp_path / "dense"))


def test_a_language_model(language_model, tmp_path):
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in corpus("tales")["test"]["text"][:40])
    )
    report = chosen(
        *(language_model, tmp_path / "rows.jsonl", tmp_path),
        {"layers": 1, "heads": [0, 0.5]},
        task="causal-lm",
    )
    winner = tmp_path / "out" / "winner"
    assert report["choice"]["sentence"].startswith("1layers-heads0.5 ")
    assert report["metric"] == "perplexity"
    heads = report["structure"]["num_attention_heads"]
    assert heads == {"dense": 4, "compressed": 2}
    assert holds(winner, "--data", str(tmp_path / "rows.jsonl"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "audio-classification"}, "has no feature extractor"),
        ({"task": "image-classification"}, "has no column 'image'"),
        ({"space": {"vocabulary": True}}, "has a Wav2Vec2FeatureExtractor and no fast tokenizer"),
        ({"audio_column": "label"}, "column 'label' is no sound"),
    ],
)
def test_refusals(models, sound, tmp_path, change, message):
    settings = {"task": "audio-classification", "max_drop": 1}
    model = models / ("vit" if change == {"task": "audio-classification"} else "wav2vec2")
    if "space" in change:
        (tmp_path / "space.yaml").write_text(yaml.safe_dump(change["space"]))
        change = {"space": tmp_path / "space.yaml"}
    with pytest.raises(UserError, match=message):
        main(words(model, sound, tmp_path / "out", **settings | change))


def test_a_perplexity_counts_tokens_that_a_smaller_vocabulary_has_not(language_model, tmp_path):
    flags = words(language_model, "tales", tmp_path / "out", task="causal-lm", max_drop=1)
    with pytest.raises(UserError, match="is another measure.*leave `vocabulary` out"):
        main([*flags, "--space", "{layers: 1, vocabulary: true}"])


def test_sound_of_another_rate_is_refused(models, sound, tmp_path):
    def slower(row):
        return {"audio": {**row["audio"], "sampling_rate": 8000}}

    load_from_disk(sound).map(slower).save_to_disk(tmp_path / "slow")
    with pytest.raises(UserError, match=r"8,000 samples a second, and the model is for 16,000"):
        main(
            words(
                *(models / "wav2vec2", tmp_path / "slow", tmp_path / "out"),
                **{"task": "audio-classification", "max_drop": 1},
            )
        )


def test_an_untrained_model_needs_dense_epochs(models, tmp_path):
    config = AutoConfig.from_pretrained(models / "vit")
    config.save_pretrained(tmp_path / "bare")
    with pytest.raises(UserError, match="a config and no weights: pass `dense_epochs`"):
        main(words(tmp_path / "bare", "digits", tmp_path / "out", max_drop=1))
