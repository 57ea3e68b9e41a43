"""One row for each method that works inside training: the suites of test_methods.py run over them.

A method of your own: add a row.
"""

from collections.abc import Callable
from dataclasses import dataclass

from hf_compress import PruningCallback, QuantizationCallback
from hf_compress.callbacks.rigl import RigLCallback

SPARSITY = 0.5


@dataclass(frozen=True)
class Method:
    name: str
    make: Callable
    """Makes the callback; its interval and its end suit a training of a dozen steps."""
    pattern: str = "unstructured"
    by: str = "model"
    """Where the sparsity holds: the "model", each "weight", each "row", or each group of "4"."""
    experts: bool = True
    """Whether it works on stacked experts."""
    bits: int | None = None
    """Those of the weights in the end, for methods that quantize; they set no zeros."""


def pruning(name, *, by="model", experts=True, pattern="unstructured", **settings):
    sparsity = None if ":" in pattern else SPARSITY

    def make():
        return PruningCallback(sparsity, pattern=pattern, interval=2, end=8, **settings)

    return Method(name, make, pattern, by, experts)


def quantization(name, bits, **settings):
    def make():
        return QuantizationCallback(bits, interval=2, end=8, **settings)

    return Method(name, make, by="grid", bits=min([bits] if isinstance(bits, int) else bits))


METHODS = [
    pruning("OBD", score="obd"),
    pruning("Taylor, by layer", score="taylor", scope="layer", by="weight"),
    pruning("magnitude", score="magnitude"),
    pruning("Wanda, by row", score="wanda", scope="row", by="row", experts=False),
    pruning("random", score="random"),
    pruning("OBD 2:4", pattern="2:4", by="4"),
    pruning("Wanda 2:4", pattern="2:4", score="wanda", by="4", experts=False),
    pruning("OBD in blocks", pattern="4x1"),
    pruning("Taylor in blocks, by layer", pattern="2x4", score="taylor", scope="layer", by="weight"),
    pruning("magnitude of rows", pattern="row", score="magnitude"),
    Method("RigL", lambda: RigLCallback(SPARSITY, fraction=0.3, interval=2, end=8), by="weight"),
    quantization("4 bit, MSE", 4),
    quantization(
        "3 bit, best of all grids in affine groups", 3, group_size=16, grid="auto", symmetric=False
    ),
    quantization("8 to 4 bit, median", (8, 6, 4), grid="median", symmetric=False, start=2),
    quantization("2 bit, absmax of tensors", 2, group_size="tensor", grid="absmax"),
    quantization("3 bit, learned scales", 3, group_size=8, learn_scale=True),
]
