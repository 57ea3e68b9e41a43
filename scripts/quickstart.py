"""A real model compressed on real data, end to end: what `make demo` runs.

python scripts/quickstart.py
python scripts/quickstart.py --rows 96      # a quick look
"""

import sys

from hf_compress.cli.errors import run
from hf_compress.cli.quickstart import main

if __name__ == "__main__":
    run(main, sys.argv[1:])
