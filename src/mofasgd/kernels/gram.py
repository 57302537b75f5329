"""Products of the tall factors with float64 accuracy, without float64 copies of them.

`gram` equals L' L and `combine` equals L W in float64, for L = [U GV] (m, 2r) in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _load(U, S, rows, columns, m, rank):
    """Load float64 elements of [U S], zeros outside."""
    inside = (rows < m)[:, None]
    first, second = (columns < rank)[None, :], ((columns >= rank) & (columns < 2 * rank))[None, :]
    at = rows[:, None] * rank + columns[None, :]
    value = tl.load(U + at, mask=inside & first, other=0.0) + tl.load(S + at - rank, mask=inside & second, other=0.0)
    return value.to(tl.float64)


@triton.jit
def _gram(U, S, parts, m, rank, chunk, T: tl.constexpr, M: tl.constexpr):
    """Tile (i, j) of T x T elements of what `chunk` rows add to [U S]'[U S]."""
    batch, part = tl.program_id(2).to(tl.int64), tl.program_id(1)
    width = 2 * rank
    across = tl.cdiv(width, T)
    i, j = tl.program_id(0) // across, tl.program_id(0) % across
    if i <= j:
        U += batch * m * rank
        S += batch * m * rank
        left, right = i * T + tl.arange(0, T), j * T + tl.arange(0, T)
        total = tl.zeros((T, T), dtype=tl.float64)
        for start in range(part * chunk, tl.minimum(part * chunk + chunk, m), M):
            rows = start + tl.arange(0, M)
            A, B = _load(U, S, rows, left, m, rank), _load(U, S, rows, right, m, rank)
            total = tl.dot(tl.trans(A), B, total, out_dtype=tl.float64)
        parts += (batch * tl.num_programs(1) + part) * width * width
        mask = (left < width)[:, None] & (right < width)[None, :]
        tl.store(parts + left[:, None] * width + right[None, :], total, mask=mask)
        if i < j:
            # Of a tile on the diagonal two threads would write the same element, which of them is last.
            tl.store(parts + left[:, None] + right[None, :] * width, total, mask=mask)


@triton.jit
def _combine(U, S, weights, result, active, m, rank, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """M rows and N columns of [U S] W, where the matrix is active."""
    batch = tl.program_id(2).to(tl.int64)
    if tl.load(active + batch):
        rows, columns = tl.program_id(0) * M + tl.arange(0, M), tl.program_id(1) * N + tl.arange(0, N)
        U += batch * m * rank
        S += batch * m * rank
        total = tl.zeros((M, N), dtype=tl.float64)
        for start in range(0, 2 * rank, K):
            k = start + tl.arange(0, K)
            A = _load(U, S, rows, k, m, rank)
            mask = (k < 2 * rank)[:, None] & (columns < rank)[None, :]
            B = tl.load(weights + batch * 2 * rank * rank + k[:, None] * rank + columns[None, :], mask=mask, other=0.0)
            total = tl.dot(A, B, total, out_dtype=tl.float64)
        at = result + batch * m * rank + rows[:, None] * rank + columns[None, :]
        tl.store(at, total.to(tl.float32), mask=(rows < m)[:, None] & (columns < rank)[None, :])


def gram(U: Tensor, S: Tensor, out: Tensor, T: int = 64, M: int = 32, warps: int = 4) -> None:
    """Put [U S]' [U S] into `out` (B, 2r, 2r), float64, contiguous, from float32 (B, m, r) each."""
    U, S = U.contiguous(), S.contiguous()
    batch, m, rank = U.shape
    T = min(T, max(16, triton.next_power_of_2(2 * rank)))
    tiles = triton.cdiv(2 * rank, T) ** 2
    chunks = max(1, min(triton.cdiv(m, 256), triton.cdiv(512, tiles * batch)))
    chunk = triton.cdiv(triton.cdiv(m, chunks), M) * M
    chunks = triton.cdiv(m, chunk)
    parts = out if chunks == 1 else out.new_empty(batch, chunks, 2 * rank, 2 * rank)
    with torch.cuda.device_of(U):
        _gram[(tiles, chunks, batch)](U, S, parts, m, rank, chunk, T=T, M=M, num_warps=warps)
    if chunks > 1:
        torch.sum(parts, dim=1, out=out)


def combine(U: Tensor, S: Tensor, weights: Tensor, active: Tensor, M: int = 64, K: int = 32, warps: int = 4) -> Tensor:
    """Return [U S] W (B, m, r) in float32 from W (B, 2r, r) float64; rows of matrices not `active` (B,) undefined."""
    U, S = U.contiguous(), S.contiguous()
    batch, m, rank = U.shape
    result = torch.empty_like(U)
    N = min(64, max(16, triton.next_power_of_2(rank)))
    K = min(K, max(16, triton.next_power_of_2(2 * rank)))
    grid = (triton.cdiv(m, M), triton.cdiv(rank, N), batch)
    with torch.cuda.device_of(U):
        _combine[grid](U, S, weights.contiguous(), result, active, m, rank, M=M, N=N, K=K, num_warps=warps)
    return result
