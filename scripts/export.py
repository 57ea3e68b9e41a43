"""A compressed model for another runtime: exported, run there, compared and timed.

python scripts/export.py --format openvino --bits 8 --model FOLDER --dataset reuters-r8
python scripts/export.py --format onnx --model FOLDER --dataset rows.csv --dense DENSE --threads 2
"""

import sys

from hf_compress.cli.errors import run
from hf_compress.cli.export import main

if __name__ == "__main__":
    run(main, sys.argv[1:])
