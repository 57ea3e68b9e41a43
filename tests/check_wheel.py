"""Check a built wheel: every module of the tree is in it once, and imports outside the checkout.

python tests/check_wheel.py dist/hf_compress-0.1.0-py3-none-any.whl
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def modules_in_tree():
    inside = {path.relative_to(ROOT).as_posix() for path in (ROOT / "hf_compress").rglob("*.py")}
    adapters = {f"hf_compress/callbacks/{path.name}" for path in (ROOT / "callbacks").glob("*.py")}
    return inside | adapters


def main(wheel):
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        names = [name for name in archive.namelist() if name.endswith(".py")]
        missing, twice = modules_in_tree() - set(names), len(names) != len(set(names))
        if missing or twice:
            raise SystemExit(f"{wheel}: missing {sorted(missing)}, doubled: {twice}")
        if "hf_compress/py.typed" not in archive.namelist():
            raise SystemExit(f"{wheel}: no py.typed")
        archive.extractall(folder)
        modules = [
            name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            for name in sorted(names)
        ]
        code = (
            f"import sys; sys.path.insert(0, {folder!r})\n"
            f"import importlib\nfor name in {modules!r}: importlib.import_module(name)\n"
            f"import hf_compress; assert hf_compress.__file__.startswith({folder!r})"
        )
        subprocess.run([sys.executable, "-c", code], check=True, cwd=folder)
    print(f"{wheel}: {len(names)} modules, all import")


if __name__ == "__main__":
    main(sys.argv[1])
