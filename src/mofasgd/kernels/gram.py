"""Products of the tall factors with float64 accuracy, without float64 copies of them.

`gram` equals L' L and `combine` equals L W in float64, for L = [U GV] (m, 2r) in float32; `advance` puts L W in place
of U, and `excess` equals (L W)' L W - I. But for narrow factors a tile is of U or of GV alone: it stays float32 until a
thread multiplies it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mofasgd.kernels import cdiv, next_power_of_2


class Cut(NamedTuple):
    """How a product is cut: rows M; columns N of the result (`gram`: T x T of it); columns K at a time; warps."""

    M: int
    N: int
    K: int
    warps: int


@triton.jit
def _place(tile, rank, BOTH: tl.constexpr, T: tl.constexpr):
    """Return the columns of tile `tile` in U or S (BOTH: in both), where they lie in [U S], whether they exist."""
    half = tl.cdiv(rank, T)
    column = (0 if BOTH else (tile % half) * T) + tl.arange(0, T)
    first = BOTH or tile < half
    return column, tl.where(first, 0, rank) + column, column < (2 * rank if BOTH else rank)


@triton.jit
def _load(U, S, rows, tile, m, rank, BOTH: tl.constexpr, T: tl.constexpr):
    """Load tile number `tile` of T columns of [U S] in float64, zeros outside."""
    column, _, real = _place(tile, rank, BOTH, T)
    inside, at = (rows < m)[:, None], rows[:, None] * rank + column[None, :]
    if BOTH:
        first = column < rank
        value = tl.load(U + at, mask=inside & first[None, :], other=0.0)
        value += tl.load(S + at - rank, mask=inside & (real & (column >= rank))[None, :], other=0.0)
    else:
        A = tl.where(tile < tl.cdiv(rank, T), U, S)
        value = tl.load(A + at, mask=inside & real[None, :], other=0.0)
    return value.to(tl.float64)


@triton.jit
def _gram(U, S, parts, m, rank, chunk, across, BOTH: tl.constexpr, T: tl.constexpr, M: tl.constexpr):
    """Tile (i, j) of T x T elements of what `chunk` rows add to [U S]'[U S], `across` tiles wide."""
    batch, part = tl.program_id(2).to(tl.int64), tl.program_id(1)
    i, j = tl.program_id(0) // across, tl.program_id(0) % across
    if i <= j:
        U += batch * m * rank
        S += batch * m * rank
        total = tl.zeros((T, T), dtype=tl.float64)
        for start in range(part * chunk, tl.minimum(part * chunk + chunk, m), M):
            rows = start + tl.arange(0, M)
            A = _load(U, S, rows, i, m, rank, BOTH, T)
            B = A if BOTH else _load(U, S, rows, j, m, rank, BOTH, T)
            total = tl.dot(tl.trans(A), B, total, out_dtype=tl.float64)
        width = 2 * rank
        parts += (batch * tl.num_programs(1) + part) * width * width
        _, left, high = _place(i, rank, BOTH, T)
        _, right, low = _place(j, rank, BOTH, T)
        mask = high[:, None] & low[None, :]
        tl.store(parts + left[:, None] * width + right[None, :], total, mask=mask)
        if i < j:
            # Of a tile on the diagonal two threads would write the same element, which of them is last.
            tl.store(parts + left[:, None] + right[None, :] * width, total, mask=mask)


@triton.jit
def _columns_of(U, S, W, rows, columns, m, rank, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """Return these rows and columns of [U S] W in float64, zeros outside."""
    total = tl.zeros((M, N), dtype=tl.float64)
    inside, own = (rows < m)[:, None], (columns < rank)[None, :]
    for side in tl.static_range(2):
        A = U if side == 0 else S
        for start in range(0, rank, K):
            k = start + tl.arange(0, K)
            real = k < rank
            A_k = tl.load(A + rows[:, None] * rank + k[None, :], mask=inside & real[None, :], other=0.0)
            at = (side * rank + k)[:, None] * rank + columns[None, :]
            W_k = tl.load(W + at, mask=real[:, None] & own, other=0.0)
            total = tl.dot(A_k.to(tl.float64), W_k, total, out_dtype=tl.float64)
    return total


@triton.jit
def _combine(
    U, S, weights, result, scale, other, active, m, rank,
    SCALED: tl.constexpr, TURNED: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """M rows and N columns of [U S] W, where the matrix is active; `result` may be U if N columns are all.

    SCALED: into `other` (m, r), times `scale` (r,). TURNED: into `other` (r, m). Both zeros where not active.
    """
    batch = tl.program_id(2).to(tl.int64)
    rows, columns = tl.program_id(0) * M + tl.arange(0, M), tl.program_id(1) * N + tl.arange(0, N)
    tall, mask = batch * m * rank, (rows < m)[:, None] & (columns < rank)[None, :]
    at = tall + rows[:, None] * rank + columns[None, :]
    total = tl.zeros((M, N), dtype=tl.float64)
    moves = tl.load(active + batch)
    if moves:
        W = weights + 2 * batch * rank * rank
        total = _columns_of(U + tall, S + tall, W, rows, columns, m, rank, M, N, K)
        # All threads have read these rows of U.
        tl.debug_barrier()
        tl.store(result + at, total.to(tl.float32), mask=mask)
    if SCALED:
        by = tl.load(scale + batch * rank + columns, mask=(columns < rank) & moves, other=0.0)
        tl.store(other + at, (total.to(tl.float32) * by[None, :]).to(other.dtype.element_ty), mask=mask)
    if TURNED:
        turned = tall + columns[None, :].to(tl.int64) * m + rows[:, None]
        tl.store(other + turned, total.to(tl.float32).to(other.dtype.element_ty), mask=mask)


@triton.jit
def _excess(
    U, S, weights, close, out, m, rank, across, M: tl.constexpr, T: tl.constexpr, K: tl.constexpr
):  # fmt: skip
    """Tile (i, j) of T x T elements of ([U S] W)' [U S] W - I, where `close`; hardly ever, hence by one program."""
    batch = tl.program_id(1).to(tl.int64)
    if tl.load(close + batch):
        U += batch * m * rank
        S += batch * m * rank
        weights += batch * 2 * rank * rank
        left = (tl.program_id(0) // across) * T + tl.arange(0, T)
        right = (tl.program_id(0) % across) * T + tl.arange(0, T)
        total = tl.where(left[:, None] == right[None, :], -1.0, 0.0).to(tl.float64)
        for start in range(0, m, M):
            rows = start + tl.arange(0, M)
            A = _columns_of(U, S, weights, rows, left, m, rank, M, T, K)
            B = _columns_of(U, S, weights, rows, right, m, rank, M, T, K)
            total = tl.dot(tl.trans(A), B, total, out_dtype=tl.float64)
        mask = (left < rank)[:, None] & (right < rank)[None, :]
        tl.store(out + batch * rank * rank + left[:, None] * rank + right[None, :], total, mask=mask)


def _gram_cut(rank: int) -> Cut:
    wide = max(16, next_power_of_2(rank))
    return Cut(32, 32 if wide == 16 else min(64, wide), 0, 4)


def gram(U: Tensor, S: Tensor, out: Tensor) -> None:
    """Put [U S]' [U S] into `out` (B, 2r, 2r), float64, contiguous, from float32 (B, m, r) each."""
    U, S = U.contiguous(), S.contiguous()
    batch, m, rank = U.shape
    M, T, _, warps = _gram_cut(rank)
    both = 2 * rank <= T
    across = 1 if both else 2 * cdiv(rank, T)
    chunks = max(1, min(cdiv(m, 256), cdiv(512, across**2 * batch)))
    chunk = cdiv(cdiv(m, chunks), M) * M
    chunks = cdiv(m, chunk)
    parts = out if chunks == 1 else out.new_empty(batch, chunks, 2 * rank, 2 * rank)
    with torch.cuda.device_of(U):
        _gram[(across**2, chunks, batch)](
            U, S, parts, m, rank, chunk, across, BOTH=both, T=T, M=M, num_warps=warps
        )  # fmt: skip
    if chunks > 1:
        torch.sum(parts, dim=1, out=out)


def _whole_cut(rank: int) -> Cut:
    """Return how `advance` is cut: a program makes whole rows of the result, or it would spoil those of others."""
    N = max(16, next_power_of_2(rank))
    if N <= 128:
        return Cut(min(128, 2**12 // N), N, min(32, N) if N <= 64 else 16, 4)
    return Cut(max(16, min(64, 2**14 // N)), N, 16, 8)


def _launch(
    U: Tensor, S: Tensor, weights: Tensor, result: Tensor, active: Tensor, cut: Cut,
    scale: Tensor | None, other: Tensor | None,
) -> None:  # fmt: skip
    batch, m, rank = U.shape
    M, N, K, warps = cut
    scaled, turned = scale is not None, scale is None and other is not None
    with torch.cuda.device_of(U):
        _combine[(cdiv(m, M), cdiv(rank, N), batch)](
            U, S.contiguous(), weights.contiguous(), result, scale, other, active, m, rank,
            SCALED=scaled, TURNED=turned, M=M, N=N, K=K, num_warps=warps,
            # Three tiles of so wide weights are more than shared memory.
            num_stages=2 if N > 512 else 3,
        )  # fmt: skip


def combine(U: Tensor, S: Tensor, weights: Tensor, active: Tensor) -> Tensor:
    """Return [U S] W (B, m, r) in float32 from W (B, 2r, r) float64; rows of matrices not `active` (B,) undefined."""
    U, rank = U.contiguous(), U.shape[-1]
    result, wide = torch.empty_like(U), max(16, next_power_of_2(rank))
    _launch(U, S, weights, result, active, Cut(64, min(64, wide), min(32, wide), 4), None, None)
    return result


def advance(
    U: Tensor, S: Tensor, weights: Tensor, active: Tensor, scale: Tensor | None = None, other: Tensor | None = None
) -> None:
    """Put [U S] W (B, m, r) in place of U, float32, contiguous, where `active` (B,).

    Args:
        U, S, weights, active: as in `combine`.
        scale: (B, r) float32, or None.
        other: if given, the result times `scale`, (B, m, r), or without `scale` its transpose, (B, r, m), is put here
            in its dtype; zeros where not active.
    """
    assert U.is_contiguous()
    _launch(U, S, weights, U, active, _whole_cut(U.shape[-1]), scale, other)


def excess(U: Tensor, S: Tensor, weights: Tensor, close: Tensor, out: Tensor) -> None:
    """Put ([U S] W)' [U S] W - I into `out` (B, r, r) where `close` (B,) bool; the others are as in `combine`."""
    batch, m, rank = U.shape
    T = 16 if rank <= 16 else 32
    across = cdiv(rank, T)
    with torch.cuda.device_of(U):
        _excess[(across**2, batch)](
            U.contiguous(), S.contiguous(), weights.contiguous(), close, out, m, rank, across, M=32, T=T, K=16,
            num_warps=4,
        )  # fmt: skip
