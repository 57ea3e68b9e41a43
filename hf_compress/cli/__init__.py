"""`hf-compress COMMAND`: the bodies of what stands in scripts/."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of the installed command."""
    from hf_compress.cli import choose, compress, export, oneshot, quickstart, structure, verify
    from hf_compress.cli.errors import run

    commands = {
        "choose": choose,
        "compress": compress,
        "oneshot": oneshot,
        "structure": structure,
        "export": export,
        "quickstart": quickstart,
        "verify": verify,
    }
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in commands:
        lines = [f"usage: hf-compress {{{','.join(commands)}}} [--config recipe.yaml] [--flag value]"]
        for command, module in commands.items():
            lines.append(f"  {command:12}{(module.__doc__ or '').partition(':')[0].splitlines()[0]}")
        lines.append("`hf-compress COMMAND --help` lists its flags.")
        asked = name in ("-h", "--help")
        print("\n".join(lines), file=sys.stdout if asked else sys.stderr)
        raise SystemExit(0 if asked else 2)
    run(commands[name].main, sys.argv[2:])
