"""Decoder language models as GGUF, the files of llama.cpp, by AutoRound, which brings its converter."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedModel

from hf_compress.exporting.gguf_blocks import write_codes
from hf_compress.quantization.grids import Grid

KINDS = {8: "Q8_0", 4: "Q4_0"}
"""Kinds of blocks by their bits: 32 weights along the input share a scale of 16 bits."""


def write_gguf(
    model: PreTrainedModel,
    tokenizer: str | Path,
    place: str | Path,
    *,
    bits: int,
    grids: Mapping[str, Grid] | None = None,
) -> Path:
    """Writes `model`, with the tokenizer of that folder in it, to one file in the folder `place`.

    bits: 8 or 4, of the blocks that weights are rounded to. Embeddings, and what does not divide into
        blocks, get others by the rules of llama.cpp; norms and biases stay floats.
    grids: by the names of weights that lie on them; they keep their integers, and their scales in 16
        bits. See `hf_compress.exporting.gguf_blocks.fits`.

    Raises ValueError for a model that is no decoder language model, where the converter fails, and
    where weights would not be what they are in `grids`.
    """
    if not model.can_generate() or model.config.is_encoder_decoder:
        raise ValueError(
            f"gguf is for decoder language models, and {type(model).__name__} is none: take onnx or "
            "openvino."
        )
    kind = KINDS[bits]
    with tempfile.TemporaryDirectory(dir=place) as scratch:
        source, out = Path(scratch, "model"), Path(scratch, "gguf")
        _save_floats(model, tokenizer, source)
        _convert(source, out, kind)
        (made,) = out.rglob("*.gguf")
        if grids:
            write_codes(made, model, grids, kind)
        return made.rename(Path(place, f"model-{kind}.gguf"))


def _save_floats(model: PreTrainedModel, tokenizer: str | Path, folder: Path) -> None:
    try:
        words = AutoTokenizer.from_pretrained(tokenizer)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"gguf holds the tokenizer, and there is none in {tokenizer}: {error}"
        ) from error
    words.save_pretrained(folder)
    model.save_pretrained(folder)


def _convert(source: Path, out: Path, kind: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "hf_compress.exporting.gguf_converter", str(source), str(out), kind],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # Whatever the environment says, it is not to fetch a newer converter and run that.
        env={**os.environ, "AUTO_ROUND_GGUF_AUTO_UPDATE": "0", "AR_LOG_LEVEL": "ERROR"},
    ) as process:
        assert process.stderr is not None
        said = ["nothing"]
        for line in process.stderr:
            if "%|" in line:  # a bar
                sys.stderr.write("\r" + line.rstrip())
            elif line.strip():
                said.append(line.strip())
    if process.returncode:
        raise ValueError(f"AutoRound could not convert the model to gguf. It says: {said[-1]}")
    sys.stderr.write("\n")
