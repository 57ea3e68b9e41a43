"""Prune a trained model in minutes, without training.

python scripts/oneshot.py --model M --task causal-lm --dataset prose.jsonl --pattern 2:4 --output_dir o
python scripts/oneshot.py --model M --dataset reuters-r8 --score wanda --sparsity 0.5 --output_dir o
"""

import sys

from hf_compress.cli.errors import run
from hf_compress.cli.oneshot import main

if __name__ == "__main__":
    run(main, sys.argv[1:])
