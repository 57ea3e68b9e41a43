"""Runs a script as one of several ranks, and leaves before Python takes itself down.

A thread of gloo outlives `destroy_process_group` where a device mesh holds its group, and aborts
the process when it frees its last tensor while Python ends.
"""

import os
import runpy
import sys
from pathlib import Path

sys.argv = sys.argv[1:]
sys.path[0] = str(Path(sys.argv[0]).parent)
runpy.run_path(sys.argv[0], run_name="__main__")
sys.stdout.flush()
sys.stderr.flush()
os._exit(0)
