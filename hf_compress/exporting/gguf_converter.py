"""AutoRound's conversion, which keeps models in globals, as a process of its own.

python -m hf_compress.exporting.gguf_converter MODEL OUT KIND
"""

from __future__ import annotations

import sys

from hf_compress.devices import host


def main(source: str, out: str, kind: str) -> None:
    from auto_round import AutoRound

    name = f"gguf:{kind.lower()}"
    rounding = AutoRound(
        model=source,
        scheme=name,
        iters=0,
        # Better scales want rows, which it would fetch.
        disable_opt_rtn=True,
        # It would round to bf16 first.
        amp=False,
        model_dtype="float32",
        device_map=str(host()),
        trust_remote_code=False,
    )
    rounding.quantize_and_save(output_dir=out, format=name)


if __name__ == "__main__":
    main(*sys.argv[1:])
