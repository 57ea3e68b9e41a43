"""`python -m hf_compress.verify REPO_OR_FOLDER`: see `hf_compress.cli.verify`."""

import sys

from hf_compress.cli.errors import run
from hf_compress.cli.verify import main

if __name__ == "__main__":
    run(main, sys.argv[1:])
