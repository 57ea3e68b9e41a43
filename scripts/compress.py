"""Prune and distil a model on a dataset, on one process or many.

python scripts/compress.py --config scripts/recipes/prune90.yaml --model M --dataset reuters-r8
accelerate launch scripts/compress.py --config scripts/recipes/prune80_distill.yaml --model M ...
torchrun --nproc_per_node 2 scripts/compress.py --use_cpu --config ...
"""

import sys

from hf_compress.cli.compress import main
from hf_compress.cli.errors import run

if __name__ == "__main__":
    run(main, sys.argv[1:])
