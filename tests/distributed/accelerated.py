"""Scripts on two processes of one CPU, as `accelerate launch` starts them."""

import os
import subprocess
import sys
from pathlib import Path

from accelerate.commands import accelerate_cli

LAUNCH = (
    "launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no "
    "--dynamo_backend no --main_process_port 0"
)


def accelerate_launch(script, *arguments):
    """Run `script` to its end; what it said where it fails."""
    command = [sys.executable, accelerate_cli.__file__, *LAUNCH.split()]
    command += [str(Path(__file__).with_name("rank.py")), str(script), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
