"""`hf-compress COMMAND`: the bodies of what stands in scripts/."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of the installed command."""
    from hf_compress.cli import compress, oneshot, quickstart, structure

    commands = {
        "compress": compress.main,
        "oneshot": oneshot.main,
        "structure": structure.main,
        "quickstart": quickstart.main,
    }
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in commands:
        raise SystemExit(
            f"usage: hf-compress {{{','.join(commands)}}} [--config recipe.yaml] [--flag value]"
        )
    commands[name](sys.argv[2:])
