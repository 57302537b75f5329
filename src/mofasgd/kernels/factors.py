"""Tall factors for the complement: bases of what is seen, and the residual's factors in a few launches a shape.

`extend` is the torch path of `solver.GramProblem.spaces`. `cross` and `join` are the products with tall matrices of
`mofasgd.residual`, in float32 as three TF32 products.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mofasgd.kernels import cdiv, next_power_of_2
from mofasgd.kernels.common import TYPES


@triton.jit
def _tile(A, rows, columns, m, width):
    """Return elements of A (m, width), zeros outside."""
    mask = (rows < m)[:, None] & (columns < width)[None, :]
    return tl.load(A + rows[:, None] * width + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _both(first, second, rows, columns, m, half):
    """Return elements of [first second] (m, 2 half), zeros outside."""
    inside = rows[:, None] * half + columns[None, :]
    at = tl.where((columns < half)[None, :], first + inside, second + (inside - half))
    return tl.load(at, mask=(rows < m)[:, None] & (columns < 2 * half)[None, :], other=0.0)


@triton.jit
def _extend(U, S, weights, kept, result, m, rank, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """M rows and N columns of both halves of [U diag(kept), [U S] W]."""
    batch, j = tl.program_id(2).to(tl.int64), tl.program_id(1)
    rows, columns = tl.program_id(0) * M + tl.arange(0, M), j * N + tl.arange(0, N)
    U += batch * m * rank
    S += batch * m * rank
    weights += batch * 2 * rank * rank
    total = tl.zeros((M, N), dtype=tl.float64)
    for start in range(0, rank, K):
        k = start + tl.arange(0, K)
        W = _tile(weights, k, columns, rank, rank)
        total = tl.dot(_tile(U, rows, k, m, rank).to(tl.float64), W, total, out_dtype=tl.float64)
        W = _tile(weights + rank * rank, k, columns, rank, rank)
        total = tl.dot(_tile(S, rows, k, m, rank).to(tl.float64), W, total, out_dtype=tl.float64)
    real = tl.load(kept + batch * rank + columns, mask=columns < rank, other=0.0).to(tl.float32)
    own = _tile(U, rows, columns, m, rank) * real[None, :]
    at = result + batch * m * 2 * rank + rows[:, None] * (2 * rank) + columns[None, :]
    mask = (rows < m)[:, None] & (columns < rank)[None, :]
    tl.store(at, own, mask=mask)
    tl.store(at + rank, total.to(tl.float32), mask=mask)


def extend(U: Tensor, S: Tensor, weights: Tensor, kept: Tensor) -> Tensor:
    """Return [U diag(kept), [U S] W] (B, m, 2r) float32, the second half summed in float64.

    Args:
        U, S: (B, m, r) float32.
        weights: W (B, 2r, r) float64.
        kept: (B, r), 1 or 0.
    """
    U, S = U.contiguous(), S.contiguous()
    batch, m, rank = U.shape
    result = torch.empty(batch, m, 2 * rank, dtype=U.dtype, device=U.device)
    N = min(64, max(16, next_power_of_2(rank)))
    grid = (cdiv(m, 64), cdiv(rank, N), batch)
    with torch.cuda.device_of(U):
        _extend[grid](
            U, S, weights.contiguous(), kept.contiguous(), result, m, rank, M=64, N=N, K=min(32, N), num_warps=4
        )
    return result


@triton.jit
def _nearest_bfloat16(value):
    """Return numbers rounded to bfloat16, ties to even; the interpreter's own cast truncates."""
    bits = value.to(tl.uint32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def _cross(
    A, S1, S2, parts, m, half, chunk, T: tl.constexpr, M: tl.constexpr, BFLOAT16: tl.constexpr, WITH_S: tl.constexpr
):  # fmt: skip
    """Tile (i, j) of T x T elements of what `chunk` rows add to A'Ar, and [S1 S2]'Ar if WITH_S.

    Ar is rounded if BFLOAT16.
    """
    batch, part = tl.program_id(2).to(tl.int64), tl.program_id(1)
    width = 2 * half
    across = tl.cdiv(width, T)
    i, j = tl.program_id(0) // across * T + tl.arange(0, T), tl.program_id(0) % across * T + tl.arange(0, T)
    A += batch * m * width
    S1 += batch * m * half
    S2 += batch * m * half
    of_A, of_S = tl.zeros((T, T), dtype=tl.float32), tl.zeros((T, T), dtype=tl.float32)
    for start in range(part * chunk, tl.minimum(part * chunk + chunk, m), M):
        rows = start + tl.arange(0, M)
        rounded = _tile(A, rows, j, m, width)
        if BFLOAT16:
            rounded = _nearest_bfloat16(rounded)
        of_A = tl.dot(tl.trans(_tile(A, rows, i, m, width)), rounded, of_A, input_precision="tf32x3")
        if WITH_S:
            of_S = tl.dot(tl.trans(_both(S1, S2, rows, i, m, half)), rounded, of_S, input_precision="tf32x3")
    parts += (batch * tl.num_programs(1) + part) * (2 if WITH_S else 1) * width * width
    at, mask = i[:, None] * width + j[None, :], (i < width)[:, None] & (j < width)[None, :]
    tl.store(parts + at, of_A, mask=mask)
    if WITH_S:
        tl.store(parts + width * width + at, of_S, mask=mask)


def cross(A: Tensor, S: tuple[Tensor, Tensor] | None, dtype: torch.dtype) -> Tensor:
    """Return A'Ar and, unless S is None, S'Ar, (B, 1 or 2, k, k) float32, with Ar = A rounded to `dtype`.

    Args:
        A: (B, m, k) float32, contiguous.
        S: halves of its columns, (B, m, k / 2) each, float32, contiguous.
        dtype: bfloat16 or float32.
    """
    batch, m, width = A.shape
    T = min(64, max(16, next_power_of_2(width)))
    tiles = cdiv(width, T) ** 2
    chunks = max(1, min(cdiv(m, 256), cdiv(1024, tiles * batch)))
    chunk = cdiv(cdiv(m, chunks), 32) * 32
    chunks = cdiv(m, chunk)
    parts = A.new_empty(batch, chunks, 1 if S is None else 2, width, width)
    first, second = (A, A) if S is None else S
    with torch.cuda.device_of(A):
        _cross[(tiles, chunks, batch)](
            A, first, second, parts, m, width // 2, chunk,
            T=T, M=32, BFLOAT16=dtype is torch.bfloat16, WITH_S=S is not None, num_warps=4,
        )  # fmt: skip
    return parts.sum(dim=1) if chunks > 1 else parts[:, 0]


@triton.jit
def _join(
    A, S1, S2, weights, inverse, result, squares, m, half, bound,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, LOW: tl.constexpr, LEFT: tl.constexpr,
):  # fmt: skip
    """M rows and N columns of both halves of [bound A, S W + A W'] (LEFT) or [S W, bound A], and squares of columns.

    S is [S1 S2].
    """
    width = 2 * half
    batch, j = tl.program_id(2).to(tl.int64), tl.program_id(1)
    rows, columns = tl.program_id(0) * M + tl.arange(0, M), j * N + tl.arange(0, N)
    A += batch * m * width
    S1 += batch * m * half
    S2 += batch * m * half
    weights += batch * (2 if LEFT else 1) * width * width
    total = tl.zeros((M, N), dtype=tl.float32)
    for start in range(0, width, K):
        k = start + tl.arange(0, K)
        W = _tile(weights, k, columns, width, width)
        total = tl.dot(_both(S1, S2, rows, k, m, half), W, total, input_precision="tf32x3")
        if LEFT:
            W = _tile(weights + width * width, k, columns, width, width)
            total = tl.dot(_tile(A, rows, k, m, width), W, total, input_precision="tf32x3")
    own = _tile(A, rows, columns, m, width) * bound
    # A matrix that is no number leaves no complement, and zeros are the same in every product.
    real = tl.load(inverse + batch) != 0
    total, own = tl.where(real, total, 0.0), tl.where(real, own, 0.0)
    place, other = (width, 0) if LEFT else (0, width)
    at = result + batch * m * 2 * width + rows[:, None] * (2 * width) + columns[None, :]
    mask = (rows < m)[:, None] & (columns < width)[None, :]
    tl.store(at + place, total.to(LOW), mask=mask)
    tl.store(at + other, own.to(LOW), mask=mask)
    squares += (batch * tl.num_programs(0) + tl.program_id(0)) * 2 * width + columns
    tl.store(squares + place, tl.sum(total * total, axis=0), mask=columns < width)
    tl.store(squares + other, tl.sum(own * own, axis=0), mask=columns < width)


def join(
    A: Tensor,
    S: tuple[Tensor, Tensor],
    weights: Tensor,
    inverse: Tensor,
    bound: float,
    dtype: torch.dtype,
    *,
    left: bool,
) -> tuple[Tensor, Tensor]:
    """Return [bound A, S W + A W'] if `left`, else [S W, bound A], (B, m, 2k), and its columns' squares, (B, 2k).

    Args:
        A: (B, m, k) float32, contiguous.
        S: halves of its columns, (B, m, k / 2) each, float32, contiguous.
        weights: W, below it W' if `left`; (B, 2k or k, k) float32.
        inverse: (B,); 0 makes zeros of a matrix, whatever the others hold.
        bound: of A.
        dtype: of the result, float16 or float32.
    """
    batch, m, width = A.shape
    N = min(64, max(16, next_power_of_2(width)))
    programs = cdiv(m, 64)
    result = torch.empty(batch, m, 2 * width, dtype=dtype, device=A.device)
    squares = A.new_empty(batch, programs, 2 * width)
    with torch.cuda.device_of(A):
        _join[(programs, cdiv(width, N), batch)](
            A, *S, weights.contiguous(), inverse, result, squares, m, width // 2, bound,
            M=64, N=N, K=min(32, N), LOW=TYPES[dtype], LEFT=left, num_warps=4,
        )  # fmt: skip
    return result, squares.sum(dim=1)
