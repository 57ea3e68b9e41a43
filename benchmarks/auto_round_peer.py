"""The work of one process in an environment that has auto-round: rounds the model in a folder, and
writes what it rounded it to as floats, so that any environment can measure it.

    python auto_round_peer.py --model FOLDER --calibration FILE --output FOLDER --bits 4

The calibration file is safetensors with `input_ids` of shape (rows, length).
"""

import argparse
import json
from importlib.metadata import version

from auto_round import AutoRound
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group_size", type=int, required=True)
    parser.add_argument("--iters", type=int, required=True)
    options = parser.parse_args()
    ids = load_file(options.calibration)["input_ids"]
    rows, length = ids.shape
    rounded, _ = AutoRound(
        AutoModelForCausalLM.from_pretrained(options.model),
        AutoTokenizer.from_pretrained(options.model),
        bits=options.bits,
        group_size=options.group_size,
        iters=options.iters,
        seqlen=length,
        nsamples=rows,
        batch_size=4,
        dataset=[{"input_ids": part} for part in ids.split(4)],
        device_map="cpu",
        enable_torch_compile=False,  # minutes for each block, more than it saves
    ).quantize()
    # Its own saving in the format "fake" puts the dense weights back, where these are in float32.
    rounded.save_pretrained(options.output)
    print(json.dumps({"auto_round": version("auto-round")}))


if __name__ == "__main__":
    main()
