"""What `choose` finds for "at most one point lost" on 20 Newsgroups with MiniLM, and the share of its
time that stopping losers early saved.

    python benchmarks/choose_20newsgroups.py

The dense model is fine-tuned first, on nine tenths of the training rows; the other tenth chooses. With
the finalists it is run in ONNX Runtime and OpenVINO too, in 8 bits, which is what these tools do alone.
Spent are the measured seconds of all trainings; what full ones of all candidates would have taken is
measured where there was one, and else each candidate's own seconds for a step times the steps of a full
one. All is kept in the cache, so that a run which was stopped goes on where it was. Prints JSON.
"""

import argparse
import contextlib
import json
import sys

import minilm
import torch
import yaml

from hf_compress.choosing.telling import to_dict
from hf_compress.cli.choose import ChooseArguments, choose
from hf_compress.distillation.arguments import DistillationArguments
from hf_compress.measure import environment
from hf_compress.samples import minilm as model

RUNTIMES = ("onnx-int8", "openvino-int8")
SPACE = {"layers": [4, 3, 2, 1], "ffn": [0, 0.5], "vocabulary": True, "bits": [None, 8]}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=4000, help="of each split, at random")
    parser.add_argument("--length", type=int, default=64, help="tokens for each row")
    parser.add_argument("--dense_epochs", type=float, default=3)
    parser.add_argument("--epochs", type=float, default=8, help="of a full training")
    parser.add_argument("--learning_rate", type=float, default=5e-4)
    parser.add_argument("--drop", type=float, default=1.0, help="percentage points")
    parser.add_argument("--finalists", type=int, default=3)
    parser.add_argument("--bf16", action="store_true", help="autocast, faster where the CPU has it")
    options = parser.parse_args()
    folder = minilm.CACHE / "choose-20newsgroups"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "space.yaml").write_text(yaml.safe_dump(SPACE))
    arguments = ChooseArguments(
        model=model(),
        dataset="20newsgroups",
        max_length=options.length,
        max_train_rows=options.rows,
        max_eval_rows=options.rows,
        max_drop=options.drop,
        dense_epochs=options.dense_epochs,
        finalists=options.finalists,
        runtimes=list(RUNTIMES),
        space=str(folder / "space.yaml"),
    )
    training = DistillationArguments(
        str(folder),
        num_train_epochs=options.epochs,
        learning_rate=options.learning_rate,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=64,
        warmup_steps=0.1,
        bf16=options.bf16,
        use_cpu=not torch.cuda.is_available(),  # bf16 on a CPU asks for it
        report_to="none",
    )
    with contextlib.redirect_stdout(sys.stderr):
        found = to_dict(choose(arguments, training))
    result = {**vars(options), "space": SPACE, **found, "environment": environment()}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
