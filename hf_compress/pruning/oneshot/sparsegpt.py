"""SparseGPT: prunes column after column, and lets the columns that follow make up for the error.

Frantar and Alistarh 2023, arXiv:2301.00774.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hf_compress.pruning.patterns import keep_n_of_m
from hf_compress.pruning.select import keep_highest

COLUMNS = 256
"""Of a symmetric or triangular matrix, how many columns are worked on at once."""


def sparsegpt(
    weight: Tensor,
    factor: Tensor,
    *,
    sparsity: float,
    n_of_m: tuple[int, int] | None = None,
    block_size: int = 128,
) -> Tensor:
    """The pruned weight (out, in), its kept entries updated so that the layer's output stays near.

    weight: (out, in), fp32. factor: (in, in), from `inverse_factor`.
    sparsity: fraction in [0, 1) that is pruned, exactly round(sparsity * weight.numel()) entries. In
        each block of columns those of the lowest w^2 / [H^-1]_jj, H over the columns from j on.
    n_of_m: (n, m) keeps the n best of each m neighbours instead, and `sparsity` is not read.
    block_size: columns among which entries compete; a multiple of m.
    """
    # Columns as rows: each step then reads and writes memory in one piece.
    columns = weight.t().clone(memory_format=torch.contiguous_format)  # (in, out)
    rows = columns.shape[1]
    scales = factor.diagonal()[:, None]  # (in, 1): the square root of [H^-1]_jj
    pruned = torch.zeros_like(columns, dtype=torch.bool)

    def without_the_lowest(j: int, rest: Tensor) -> Tensor:
        if n_of_m is not None:
            if j % n_of_m[1] == 0:
                group = slice(j, j + n_of_m[1])
                score = (rest[: n_of_m[1]] / scales[group]).abs_()
                pruned[group] = ~keep_n_of_m(score.t(), *n_of_m).t()
        elif j % block_size == 0:
            end = j + len(rest)
            count = round(sparsity * rows * end) - round(sparsity * rows * j)
            pruned[j:end] = _lowest(rest / scales[j:end], count)
        return rest[0].masked_fill(pruned[j], 0)

    sweep_(columns, factor, without_the_lowest, block_size=block_size)
    return columns.t()


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


def _lowest(score: Tensor, count: int) -> Tensor:
    """Bool mask of the `count` entries of the lowest |score|."""
    (kept,) = keep_highest(torch.abs, [(score,)], score.numel() - count)
    return ~kept
