"""Second-order updates from a layer's inputs: the optimal brain surgeon's sweep over a matrix.

What becomes of one column is made up for by those that follow, in the way of Frantar and Alistarh 2023,
arXiv:2301.00774, which SparseGPT and GPTQ share.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

COLUMNS = 256
"""Of a symmetric or triangular matrix, how many columns are worked on at once."""


def sweep_(
    columns: Tensor,
    factor: Tensor,
    replace: Callable[[int, Tensor], Tensor],
    *,
    block_size: int = 128,
) -> None:
    """Replaces one input column of a weight after the other, in place, and updates those that follow so
    that the layer's output stays near: the optimal brain surgeon's step.

    columns: (in, out), fp32. factor: (in, in), from `inverse_factor`.
    replace(j, rest): what becomes of column j, the first of `rest`: it and those that follow in its
        block, as they are by then, (up to block_size, out).
    block_size: columns after which the rest of the matrix is updated.
    """
    width = len(columns)
    for start in range(0, width, block_size):
        end = min(start + block_size, width)
        errors = torch.empty_like(columns[start:end])
        for j in range(start, end):
            replaced = replace(j, columns[j:end])
            error = torch.sub(columns[j], replaced, out=errors[j - start]).div_(factor[j, j])
            columns[j] = replaced
            columns[j + 1 : end].addr_(factor[j, j + 1 : end], error, alpha=-1)
        columns[end:].addmm_(factor[start:end, end:].t(), errors, alpha=-1)


def inverse_factor(gram: Tensor, *, damping: float = 0.01) -> Tensor:
    """The upper triangular U (in, in) with U^T U = H^-1, for H = gram + damping * mean(diag) * I.

    gram: (in, in), the sum of x x^T over the inputs x of the layer. All zero counts as the identity.
    damping: above 0; the more, the nearer to magnitude pruning without updates. Next to none for
        features that are zero in all inputs.
    U[j, j:] is, but for its scale, the row of the inverse of H over the columns from j on, and
    U[j, j]^2 its first entry: all that pruning from left to right needs.

    In the precision of `gram`, to which its sum was rounded, or where H is not positive definite in
    that, in double. Raises ValueError where it is in neither.
    """
    for dtype in (gram.dtype, torch.float64):
        # Read from the last row and column to the first, a lower factor L of H is an upper one R with
        # H = R R^T, and U is its inverse: neither H^-1 nor a second factorization is needed.
        hessian = gram.flip(0, 1).to(dtype)
        diagonal = hessian.diagonal()
        added = torch.full_like(diagonal, damping * (diagonal.mean().item() or 1.0))
        # A feature that is never seen costs nothing to prune: its weights come first.
        diagonal.add_(torch.where(diagonal > 0, added, 1e-6 * added))
        lower, info = torch.linalg.cholesky_ex(hessian)
        if info.item() == 0:
            del hessian, diagonal
            return _invert_lower_(lower).flip(0, 1).to(gram.dtype)
    raise ValueError(
        f"the inputs of a layer are too dependent on each other for `damping={damping}`: raise it."
    )


def add_gram(total: Tensor | None, inputs: Tensor) -> Tensor:
    """Adds inputs (positions, in) to the sum of x x^T (in, in), in place."""
    width = inputs.shape[1]
    if total is None:
        total = inputs.new_zeros(width, width)
    for start in range(0, width, COLUMNS):
        end = min(start + COLUMNS, width)
        total[start:end, start:].addmm_(inputs[:, start:end].t(), inputs[:, start:])
        total[end:, start:end] = total[start:end, end:].t()  # half the products are the other half's
    return total


def _invert_lower_(lower: Tensor) -> Tensor:
    """The inverse of a lower triangular matrix, in its place."""
    width = len(lower)
    identity = torch.eye(width, min(COLUMNS, width), dtype=lower.dtype, device=lower.device)
    for start in range(0, width, COLUMNS):
        end = min(start + COLUMNS, width)
        # Above `start` these columns of the inverse are zero, as they are in `lower`; and no column of
        # `lower` before them is needed any more.
        rest, right = lower[start:, start:], identity[: width - start, : end - start]
        lower[start:, start:end] = torch.linalg.solve_triangular(rest, right, upper=False)
    return lower
