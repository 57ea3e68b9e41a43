"""Remove neurons, heads and layers of a trained model, without training.

python scripts/structure.py --model BERT --dataset reuters-r8 --ffn 0.5 --layers 3 --output_dir o
python scripts/structure.py --model LLAMA --task causal-lm --dataset t.jsonl --heads 0.25 --output_dir o
"""

import sys

from hf_compress.cli.errors import run
from hf_compress.cli.structure import main

if __name__ == "__main__":
    run(main, sys.argv[1:])
