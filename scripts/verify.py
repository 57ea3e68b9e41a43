"""Check each number on the card of a published model; status 1 where one is wrong.

python scripts/verify.py ORG/MODEL
python scripts/verify.py FOLDER --data rows.csv --latency
"""

import sys

from hf_compress.cli.errors import run
from hf_compress.cli.verify import main

if __name__ == "__main__":
    run(main, sys.argv[1:])
