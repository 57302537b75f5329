"""Orthonormal combinations of a matrix's columns from its Gram matrix, one launch for many.

Equals `mofasgd.algebra.independent_columns` of the torch path: Gram-Schmidt on the Gram matrix, column after column, a
dependent one left out, and once more on what has come of it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _orthogonalize(A, row, column, k, least):
    """Return (R, N, which columns are kept) of the Gram matrix A: A = R'R, N'AN = I; zeros where a pivot <= `least`."""
    N = (row[:, None] == column[None, :]).to(tl.float64)
    R = tl.zeros_like(A)
    for j in range(k):
        line = tl.sum(tl.where(row[:, None] == j, A, 0.0), 0)
        pivot = tl.sum(tl.where(column == j, line, 0.0), 0)
        real = pivot > least
        scale = tl.where(real, 1 / tl.sqrt(tl.where(real, pivot, 1.0)), 0.0)
        line = tl.where(column >= j, line * scale, 0.0)
        R = tl.where(row[:, None] == j, line[None, :], R)
        after = tl.where(column > j, line, 0.0)
        own = tl.sum(tl.where(column[None, :] == j, N, 0.0), 1) * scale
        N = tl.where(column[None, :] == j, own[:, None], N - own[:, None] * after[None, :])
        above = tl.sum(tl.where(row[:, None] == column[None, :], after[None, :], 0.0), 1)
        A -= above[:, None] * after[None, :]
    return R, N


@triton.jit
def _columns(gram, R, N, k, DEPENDENT: tl.constexpr, K: tl.constexpr):
    """R and N of the Gram matrix number program_id(0)."""
    batch = tl.program_id(0).to(tl.int64) * k * k
    row, column = tl.arange(0, K), tl.arange(0, K)
    at = row[:, None] * k + column[None, :]
    inside = (row < k)[:, None] & (column < k)[None, :]
    same = row[:, None] == column[None, :]
    A = tl.load(gram + batch + at, mask=inside, other=0.0)
    square = tl.sum(tl.where(same, A, 0.0), 0)
    length = tl.sqrt(tl.where(square > 0, square, 1.0))
    high = tl.sum(tl.where(same, length[None, :], 0.0), 1)
    A = A / (high[:, None] * length[None, :])
    R1, N1 = _orthogonalize(A, row, column, k, DEPENDENT)
    # What is left of rounding, amplified by short columns, is gone after the second time.
    again = tl.dot(tl.trans(N1), tl.dot(A, N1, out_dtype=tl.float64), out_dtype=tl.float64)
    R2, N2 = _orthogonalize(again, row, column, k, 0.5)
    tl.store(R + batch + at, tl.dot(R2, R1, out_dtype=tl.float64) * length[None, :], mask=inside)
    tl.store(N + batch + at, tl.dot(N1, N2, out_dtype=tl.float64) / high[:, None], mask=inside)


def independent_columns(gram: Tensor, dependent: float) -> tuple[Tensor, Tensor]:
    """Return (R, N) (B, k, k) of finite Gram matrices (B, k, k), float64; one program holds each in registers.

    `dependent` is the part of a column's square at or below which what those before it leave of it is nothing.
    """
    batch, k, _ = gram.shape
    gram = gram.contiguous()
    R, N = torch.empty_like(gram), torch.empty_like(gram)
    K = max(16, triton.next_power_of_2(k))
    with torch.cuda.device_of(gram):
        _columns[(batch,)](gram, R, N, k, DEPENDENT=dependent, K=K, num_warps={16: 1, 32: 4}.get(K, 8))
    return R, N
