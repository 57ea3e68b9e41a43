"""Find the compressed model that fits your limits on size, latency and loss, by trying.

python scripts/choose.py --model M --dataset rows.csv --max_drop 1 --max_size 40MB --output_dir out
python scripts/choose.py --model M --dataset rows.csv --max_latency 20ms --space space.yaml ...
"""

import sys

from hf_compress.cli.choose import main
from hf_compress.cli.errors import run

if __name__ == "__main__":
    run(main, sys.argv[1:])
