"""MiniLM with the tokens of one corpus: bytes before and after, and what other texts then cost.

    python benchmarks/vocabulary.py --dataset reuters-r8 --peer_python /path/to/venv/bin/python

The peer is TextPruner, in an environment of its own (its 1.1.post2 of 2022 asks for an old numpy, but
runs with today's: `pip install --no-deps textpruner`, then `torch==2.13.0 transformers tqdm`); without
`--peer_python` it is left out. What is measured is what plain transformers load of the written folder.
Prints JSON; `seconds` are those of pruning, the peer's with writing its files. `largest_difference` is
that of the last hidden states of the first 64 training texts from those of the dense model.
"""

import argparse
import json
import subprocess
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer

from hf_compress.measure import environment
from hf_compress.pruning.vocabulary.prune import prune_vocabulary
from hf_compress.samples import corpus, minilm

COMPARED = 64


def ours(texts, folder):
    dense, tokenizer = AutoModel.from_pretrained(minilm()), AutoTokenizer.from_pretrained(minilm())
    begin = time.perf_counter()
    model, smaller = prune_vocabulary(dense, tokenizer, texts)
    seconds = time.perf_counter() - begin
    model.save_pretrained(folder / "ours")
    smaller.save_pretrained(folder / "ours")
    return {"tool": "hf_compress", "seconds": seconds, "folder": str(folder / "ours")}


def peer(texts, folder, python):
    (folder / "texts.json").write_text(json.dumps(texts))
    script = Path(__file__).with_name("text_pruner_peer.py")
    process = subprocess.run(
        [
            *(python, str(script), f"--model={minilm()}", f"--texts={folder / 'texts.json'}"),
            f"--output={folder / 'peer'}",
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    if process.returncode:
        raise SystemExit("pruning with TextPruner failed.")
    return json.loads(process.stdout.splitlines()[-1])


def states(model, tokenizer, texts):
    """The last hidden states (tokens, width) of each text."""
    with torch.no_grad():
        return [
            model.eval()(**tokenizer(text, truncation=True, max_length=256, return_tensors="pt"))[0][0]
            for text in texts
        ]


def largest_difference(before, after):
    """inf where a text has another number of tokens."""
    return max(
        float((a - b).abs().max()) if a.shape == b.shape else float("inf")
        for a, b in zip(before, after, strict=True)
    )


def measured(found, data, tokenizer, dense_states):
    """`found`, with what plain transformers load of its folder."""
    folder = Path(found.pop("folder"))
    model, smaller = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    weights = [file for file in folder.iterdir() if file.suffix in (".safetensors", ".bin")]
    found |= {
        "tokens": len(smaller),
        "parameters": model.num_parameters(),
        "weight_bytes": sum(file.stat().st_size for file in weights),
        "largest_difference": largest_difference(
            dense_states, states(model, smaller, data["train"]["text"][:COMPARED])
        ),
    }
    for split in data:
        pairs = [(tokenizer.tokenize(text), smaller.tokenize(text)) for text in data[split]["text"]]
        found[split] = {
            "same_tokens": sum(before == after for before, after in pairs) / len(pairs),
            "longer": sum(len(after) for _, after in pairs) / sum(len(before) for before, _ in pairs),
            "unknown": sum(after.count(smaller.unk_token) for _, after in pairs),
        }
    return found


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", default="reuters-r8", help="its train split is kept")
    parser.add_argument("--peer_python", help="the Python that TextPruner is installed for")
    options = parser.parse_args()
    data = corpus(options.dataset)
    dense, tokenizer = AutoModel.from_pretrained(minilm()), AutoTokenizer.from_pretrained(minilm())
    texts = list(data["train"]["text"])
    dense_states = states(dense, tokenizer, texts[:COMPARED])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        runs = [ours(texts, folder)]
        if options.peer_python:
            runs.append(peer(texts, folder, options.peer_python))
        found = [measured(run, data, tokenizer, dense_states) for run in runs]
    result = {
        "dataset": options.dataset,
        "dense": {"tokens": len(tokenizer), "parameters": dense.num_parameters()},
        "peer": "measured" if options.peer_python else "left out: no --peer_python",
        "found": found,
    }
    print(json.dumps({**result, "environment": environment()}))


if __name__ == "__main__":
    main()
