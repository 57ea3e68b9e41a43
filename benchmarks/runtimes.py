"""MiniLM, fine-tuned on 20 Newsgroups, in the runtimes of a CPU: how fast each is, and what it says.

    python benchmarks/runtimes.py --rows 4000 --bf16 --stage scores
    python benchmarks/runtimes.py --rows 4000 --bf16 --stage latency --only bf16 onnx

Stage "scores" exports, and compares each with its own model in torch, fp32, on test rows; stage
"latency" times each pass by pass in turn with the dense model in fp32, eager. What was found is kept in
the cache, so that it can be done in parts. "smaller" is the dense model without half of its layers and
neurons, and is not trained here: its time is that of the one of benchmarks/structured_20newsgroups.py,
its scores say only how faithful an export is. Prints JSON of all that is there.
"""

import argparse
import json
from dataclasses import asdict

import minilm
import torch
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding

from hf_compress.exporting.formats import export, load
from hf_compress.exporting.parity import compare
from hf_compress.latency import compare_latency
from hf_compress.measure import bytes_on_disk, environment
from hf_compress.pruning.structure.removal import prune_structure

CORPUS = "20newsgroups"
BATCHES = (1, 16)
# The precision, or the format and its bits; of the dense model, and of the smaller with "smaller-".
TORCH = ("eager-attention", "bf16", "compile", "compile-bf16", "torchao-int8-compile")
EXPORTED = {
    "onnx": ("onnx", 32),
    "onnx-int8": ("onnx", 8),
    "openvino": ("openvino", 32),
    "openvino-int8": ("openvino", 8),
}
SMALLER = ("fp32", "bf16", "onnx-int8", "openvino-int8")
ROWS = (*TORCH, *EXPORTED, *(f"smaller-{name}" for name in SMALLER))


def floats(folder, **settings):
    return AutoModelForSequenceClassification.from_pretrained(folder, **settings).eval()


def smaller(dense, folder, calibration):
    """Folder of the dense model without half of its layers and neurons."""
    if not folder.exists():
        prune_structure(
            dense, ffn=0.5, layers=3, score="activation", calibration=calibration
        ).save_pretrained(folder)
    return folder


def in_torch(kind, folder):
    """The model of `folder` as torch runs it in this way."""
    if kind == "fp32":
        return floats(folder)
    if kind == "eager-attention":
        return floats(folder, attn_implementation="eager")
    model = floats(folder, dtype=torch.bfloat16 if "bf16" in kind else torch.float32)
    if "torchao" in kind:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        quantize_(model.bert, Int8DynamicActivationInt8WeightConfig())
    return torch.compile(model) if "compile" in kind else model


def exported(kind, folder, place, calibration):
    """The same in another runtime; exported once, and kept in `place`."""
    format, bits = EXPORTED[kind]
    if not (place / "export.json").exists():
        batch = {name: value[:2] for name, value in calibration[0].items()}
        place.mkdir(parents=True, exist_ok=True)
        model, settings = floats(folder), {"tokenizer": folder, "bits": bits}
        export(model, format, place, batch, **settings, calibration=calibration)
    return load(place, format, bits=bits, threads=torch.get_num_threads())


def size(kind, folder, place):
    """Bytes on disk, where it was written."""
    if place.exists():
        return sum(path.stat().st_size for path in place.iterdir())
    if "torchao" in kind:
        return None
    return bytes_on_disk(folder) // (2 if "bf16" in kind else 1)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stage", choices=("scores", "latency"), required=True)
    parser.add_argument("--only", nargs="+", choices=ROWS, default=ROWS)
    parser.add_argument("--timed_length", type=int, default=128, help="tokens of a row that is timed")
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--score_rows", type=int, default=1000)
    parser.add_argument("--calibration_rows", type=int, default=128)
    minilm.add_dense_arguments(parser)
    options = parser.parse_args()
    (tokenizer, train, test, _), dense_folder = minilm.dense_of(CORPUS, options)
    # Of one length, so that nothing is compiled anew.
    collate = DataCollatorWithPadding(tokenizer, padding="max_length", max_length=options.length)

    def batches(rows, count, size):
        rows = rows.shuffle(seed=1).select(range(count)).remove_columns("token_type_ids")
        return [dict(collate(rows[at : at + size])) for at in range(0, count, size)]

    calibration = batches(train.remove_columns("labels"), options.calibration_rows, 16)
    dense = floats(dense_folder)
    cache = dense_folder.with_name(f"{dense_folder.name}-runtimes")
    cache.mkdir(exist_ok=True)
    for name in options.only:
        file, place = cache / f"{name}-{options.stage}.json", cache / name
        if file.exists():
            continue
        kind = name.removeprefix("smaller-")
        folder = dense_folder if kind == name else smaller(dense, cache / "smaller", calibration)
        if kind in EXPORTED:
            model = exported(kind, folder, place, calibration)
        else:
            model = in_torch(kind, folder)
        with torch.no_grad():
            if options.stage == "scores":
                rows = batches(test, options.score_rows, 25)
                found = asdict(compare(floats(folder), model, rows))
                found["bytes"] = size(kind, folder, place)
            else:
                found = {"environment": environment(), "runs": options.runs}
                for rows in BATCHES:
                    ids = torch.randint(1000, 30000, (rows, options.timed_length))
                    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
                    times = compare_latency({"dense": dense, "this": model}, inputs, runs=options.runs)
                    found[f"batch {rows}"] = {
                        **{side: asdict(latency) for side, latency in times.items()},
                        "ratio": times["dense"].median_ms / times["this"].median_ms,
                    }
        file.write_text(json.dumps(found))
    print(
        json.dumps(
            {
                "options": {name: str(value) for name, value in vars(options).items()},
                "dense_bytes": bytes_on_disk(dense_folder),
                "found": {
                    file.stem: json.loads(file.read_text()) for file in sorted(cache.glob("*.json"))
                },
            }
        )
    )


if __name__ == "__main__":
    main()
