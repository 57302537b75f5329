"""Orthonormal combinations of the columns of tall matrices, found from their Gram matrices.

From A'A alone, Gram-Schmidt makes N and R: A N has orthonormal columns, and A = (A N) R. A column that depends on
others is left out: zeros stand for it in A N and in R, and `completed` puts orthonormal columns there.

Gram matrices square what they are made of, so they are summed and factorized in float64, where half the digits are
still more than float32 has. Columns that nearly depend on others have fewer. Those of which too little is left are left
out (`DEPENDENT`), others wait for columns that show their direction better (`SHARE`), and what has come of it may be
orthogonalized once more (`again`).
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from mofasgd.kernels import usable
from mofasgd.rng import gaussian

DEPENDENT = 8e-11
"""A column whose squared distance from those before it is below this part of its square depends on them.

Products in float64 leave an error of some 1e-15 in that square, hence 1e-5 in the length of what is kept."""

SHARE = 0.5
"""Of the most that is left of any column: what must be left of the next one, unless `ENOUGH` is."""

ENOUGH = 1e-3
"""Of a column's own square: with so much left, its rounding to float32 has turned the direction by 2e-6."""

WIDEST = 1024
"""Columns of what is still worked on by Gram matrices on a GPU: factors, or the first window's sketches."""


def independent_columns(gram: Tensor, *, twice: bool = True) -> tuple[Tensor, Tensor]:
    """Return R and N (B, k, k) for A with the Gram matrix A'A: A = (A N) R. Float64.

    A N has orthonormal columns, and zeros where a column of A depends on the others (`DEPENDENT`); R has zero rows
    there. A GPU takes the columns in order: see `pivoted_columns` for when that is not enough.

    Args:
        gram: A'A.
        twice: orthogonalize once more what has come of it. Otherwise A N is as orthonormal as A'A has digits left for
            it: to some 1e-5 where columns of A nearly depend on each other.
    """
    if usable(gram.device):
        from mofasgd.kernels.columns import independent_columns as on_gpu

        return on_gpu(gram, DEPENDENT, twice)
    R, N, _ = pivoted_columns(gram, gram.diagonal(dim1=-2, dim2=-1))
    return again(gram, R, N) if twice else (R, N)


def pivoted_columns(gram: Tensor, squares: Tensor, least: float = DEPENDENT) -> tuple[Tensor, Tensor, Tensor]:
    """Return R and N as `independent_columns` does once, with columns of which little is left put off; and how little.

    The next column is the first of which `ENOUGH` is left, or at least `SHARE` of the most that is left of any, both as
    parts of their `squares`. In order, what rounding leaves of a column may become a direction, of which later columns
    that really have it are cleared; and what is left of these is more rounding than `least` allows for.

    Args:
        gram: (B, k, k), of columns, or of what others have left of them.
        squares: (B, k), of the whole columns.
        least: what takes the place of `DEPENDENT`.

    Returns:
        R, N (B, k, k), and the smallest part of its square that is left of a column that is kept, (B,), 1 at most.
    """
    if usable(gram.device):
        from mofasgd.kernels.columns import pivoted_columns as on_gpu

        return on_gpu(gram, squares, least, SHARE, ENOUGH)
    lengths = torch.where(squares > 0, squares, 1.0).sqrt()
    unit = gram / (lengths[:, :, None] * lengths[:, None, :])
    R, N = (_in_order if unit.device.type == "cpu" else _by_pivots)(unit, least)
    pivots = R.diagonal(dim1=-2, dim2=-1).square()
    closest = torch.where(pivots > 0, pivots, 1.0).amin(dim=-1)
    return R * lengths[:, None, :], N / lengths[:, :, None], closest


def _in_order(A: Tensor, least: float) -> tuple[Tensor, Tensor]:
    """`_by_pivots` by LAPACK where the order is the given one, as it is most of the time; it reads whether it is."""
    R, failed = torch.linalg.cholesky_ex(A, upper=True)
    N = torch.linalg.solve_triangular(R, torch.eye(R.shape[-1], dtype=R.dtype).expand_as(R), upper=True)
    # What is left of column k when it is the turn of column j: sum of R_ik^2 over i >= j.
    most = R.square().flip(-2).cumsum(dim=-2).flip(-2).amax(dim=-1)
    pivots = R.diagonal(dim1=-2, dim2=-1).square()
    other = ~((pivots >= (SHARE * most).clamp(max=ENOUGH)) & (pivots > least)).all(dim=-1) | (failed != 0)
    if other.any():
        R[other], N[other] = _by_pivots(A[other], least)
    return R, N


def _by_pivots(A: Tensor, least: float) -> tuple[Tensor, Tensor]:
    """`pivoted_columns` of columns whose squares are 1."""
    batch, k, _ = A.shape
    A, matrix = A.clone(), torch.arange(batch, device=A.device)
    R, N = torch.zeros_like(A), torch.eye(k, dtype=A.dtype, device=A.device).repeat(batch, 1, 1)
    kept = torch.zeros(batch, k, dtype=torch.bool, device=A.device)
    # What is left of the columns; -1: their turn has been.
    left = A.diagonal(dim1=-2, dim2=-1).clamp(min=0)
    for _ in range(k):
        most = left.amax(dim=-1, keepdim=True)
        chosen = (left >= (SHARE * most).clamp(max=ENOUGH)).int().argmax(dim=-1)
        line = torch.where(left >= 0, A[matrix, chosen], 0.0)
        pivot = line[matrix, chosen]
        kept[matrix, chosen] = real = pivot > least
        scale = torch.where(real, pivot, torch.inf).rsqrt()[:, None]
        line, own = line * scale, N[matrix, :, chosen] * scale
        R[matrix, chosen] = line
        left[matrix, chosen], line[matrix, chosen] = -1.0, 0.0
        N -= own[:, :, None] * line[:, None, :]
        N[matrix, :, chosen] = own
        A -= line[:, :, None] * line[:, None, :]
        left = torch.where(left >= 0, A.diagonal(dim1=-2, dim2=-1).clamp(min=0), -1.0)
    return R, torch.where(kept[:, None, :], N, 0.0)


def again(gram: Tensor, R: Tensor, N: Tensor) -> tuple[Tensor, Tensor]:
    """Return R and N of `gram` from what one time has made of it."""
    R2, N2 = independent_columns(N.mT @ gram @ N, twice=False)
    return R2 @ R, N @ N2


def tall_columns(gram: Tensor, least: float = DEPENDENT) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `pivoted_columns` does of [U S] (B, m, r) each, U nearly orthonormal or zero; U before S."""
    r = gram.shape[-1] // 2
    of_S = gram[:, r:, r:]
    R1, N1 = independent_columns(gram[:, :r, :r], twice=False)
    C = N1.mT @ gram[:, :r, r:]
    rest = torch.baddbmm(of_S, C.mT, C, alpha=-1)
    R2, N2, closest = pivoted_columns(rest, of_S.diagonal(dim1=-2, dim2=-1), least)
    zeros = torch.zeros_like(C)
    R = torch.cat([torch.cat([R1, C], dim=2), torch.cat([zeros, R2], dim=2)], dim=1)
    N = torch.cat([torch.cat([N1, -(N1 @ C) @ N2], dim=2), torch.cat([zeros, N2], dim=2)], dim=1)
    return R, N, closest


def tall_product(A: Tensor, B: Tensor) -> Tensor:
    """Return A'B of (B, m, k) and (B, m, l), of tall ones as a sum over strips of rows.

    A GPU's product of few matrices would sum all rows of one in a single multiprocessor.
    """
    batch, m, _ = A.shape
    strips = math.gcd(m, 16)
    if m <= 2 * WIDEST or strips == 1:
        return A.mT @ B
    A, B = (t.reshape(batch * strips, m // strips, t.shape[-1]) for t in (A, B))
    parts = A.mT @ B
    return parts.view(batch, strips, *parts.shape[1:]).sum(dim=1)


def orthonormal(A: Tensor, *, twice: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Return Q, N, R with A N = Q (B, k, r), A = Q R; columns of Q are orthonormal or zero. Float64.

    `twice`: as in `independent_columns`.
    """
    R, N = independent_columns(tall_product(A, A), twice=twice)
    return A @ N, N, R


def completed(Q: Tensor, rows: int) -> Tensor:
    """Return Q (B, k, r) with its zero columns replaced by orthonormal ones in the first `rows` >= r coordinates.

    The others, orthonormal to some 1e-5 or better, come back orthonormal to the last bit. Float64.
    """
    make = kept_filling if Q.shape[-2] <= 2 * WIDEST else _filling
    fill = make(Q.shape[-2], rows, Q.shape[-1], Q.device).expand_as(Q)
    fill = torch.baddbmm(fill, Q, tall_product(Q, fill), alpha=-1)
    missing = torch.linalg.vector_norm(Q, dim=-2, keepdim=True) < 0.5
    return orthonormal(torch.where(missing, fill, Q), twice=False)[0]


def _filling(height: int, rows: int, columns: int, device: torch.device) -> Tensor:
    """Return a matrix (height, columns) without structure in its first `rows`, and zeros below. Float64."""
    # Any fixed one will do.
    found: Tensor = torch.nn.functional.pad(gaussian(rows, columns, 0, device, torch.float64), (0, 0, 0, height - rows))
    return found


kept_filling = functools.lru_cache(maxsize=64)(_filling)
"""For small matrices, which take many launches to make."""
