"""Shared by the benchmarks of memory."""

from pathlib import Path


def peak_bytes():
    """The highest resident memory of this process."""
    # Not getrusage: on Linux its peak is inherited from the parent.
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
