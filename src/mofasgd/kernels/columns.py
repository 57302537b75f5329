"""Orthonormal combinations of a matrix's columns from its Gram matrix, one launch for many.

`pivoted_columns` equals that of `mofasgd.columns`: Gram-Schmidt on the Gram matrix, a dependent column left out.
`independent_columns` takes the columns in order, by blocks where they are many. Many columns are taken in order first,
and only where that is not the order of the pivots one by one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mofasgd.kernels import next_power_of_2


@triton.jit
def _root(pivot, least):
    """Return 1 / sqrt(pivot), 0 unless it is above `least`."""
    real = pivot > least
    return tl.where(real, 1 / tl.sqrt(tl.where(real, pivot, 1.0)), 0.0)


@triton.jit
def _orthogonalize(A, row, column, k, least):
    """Return (R, N) of the Gram matrix A: A = R'R, N'AN = I; zeros where a pivot <= `least`."""
    N = (row[:, None] == column[None, :]).to(tl.float64)
    for j in range(k):
        line = tl.sum(tl.where(row[:, None] == j, A, 0.0), 0)
        scale = _root(tl.sum(tl.where(column == j, line, 0.0), 0), least)
        line *= scale
        after = tl.where(column > j, line, 0.0)
        own = tl.sum(tl.where(column[None, :] == j, N, 0.0), 1) * scale
        N = tl.where(column[None, :] == j, own[:, None], N - own[:, None] * after[None, :])
        # Rows above are done and `after` is zero there: row j of R takes the place of row j of A.
        A = tl.where(row[:, None] == j, line[None, :], A - after[:, None] * after[None, :])
    return tl.where(row[:, None] <= column[None, :], A, 0.0), N


@triton.jit
def _kept_order(R, length, column, inside, k, least, share, enough, T: tl.constexpr):
    """Return whether R, made of columns of these lengths in order, is that of the pivots; and the smallest pivot."""
    below = tl.zeros_like(length)
    wrong, closest = 0, tl.full([], 1.0, tl.float64)
    for i in range(tl.cdiv(k, T)):
        row = (tl.cdiv(k, T) - 1 - i) * T + tl.arange(0, T)
        mask = (row < k)[:, None] & inside[None, :]
        squares = tl.load(R + row[:, None] * k + column[None, :], mask=mask, other=0.0) / length[None, :]
        squares *= squares
        # What is left of all columns when it is the turn of one: the squares of its row and of those below.
        left = tl.cumsum(squares, 0, reverse=True) + below[None, :]
        below += tl.sum(squares, 0)
        pivot = tl.sum(tl.where(row[:, None] == column[None, :], squares, 0.0), 1)
        bad = (pivot <= least) | (pivot < tl.minimum(share * tl.max(left, 1), enough))
        wrong += tl.sum(tl.where(bad & (row < k), 1, 0), 0)
        closest = tl.minimum(closest, tl.min(tl.where(row < k, pivot, 1.0), 0))
    return wrong == 0, closest


@triton.jit
def _pivoted(
    gram, squares, R, N, lines, own_lines, closest, k, of_batch, of_column, least, share, enough,
    TRIED: tl.constexpr, K: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """R and N of the Gram matrix number program_id(0), its columns in the order of `mofasgd.columns.pivoted_columns`.

    `squares` has strides (of_batch, of_column). TRIED: R and N hold the outcome of the given order, which stays if it
    is that of the pivots. lines, own_lines: rows of R and columns of N in that order, of unit columns, T at a time.
    """
    number = tl.program_id(0).to(tl.int64)
    batch = number * k * k
    gram += batch
    R += batch
    N += batch
    lines += batch
    own_lines += batch
    column = tl.arange(0, K)
    inside = column < k
    length = tl.load(squares + number * of_batch + column * of_column, mask=inside, other=1.0)
    length = tl.sqrt(tl.where(length > 0, length, 1.0))
    if TRIED:
        done, smallest = _kept_order(R, length, column, inside, k, least, share, enough, T)
        if done:
            tl.store(closest + number, smallest)
            return
        tl.debug_barrier()
    for row in range(k):
        tl.store(R + row * k + column, tl.zeros_like(length), mask=inside)
        tl.store(N + row * k + column, tl.zeros_like(length), mask=inside)
    tl.debug_barrier()
    smallest = tl.full([], 1.0, tl.float64)
    left = tl.load(gram + column * (k + 1), mask=inside, other=0.0) / (length * length)
    # -1: its turn has been, or there is no such column.
    left = tl.where(inside, tl.maximum(left, 0.0), -1.0)
    count, most = 0, tl.max(left, 0)
    while most > least:
        j = tl.min(tl.where(left >= tl.minimum(share * most, enough), column, K), 0)
        its_length = tl.sum(tl.where(column == j, length, 0.0), 0)
        line = tl.load(gram + j * k + column, mask=inside, other=0.0) / (its_length * length)
        own = (column == j).to(tl.float64)
        for start in range(0, count, T):
            before = start + tl.arange(0, T)
            mask = (before < count)[:, None] & inside[None, :]
            at = before[:, None] * k + column[None, :]
            part = tl.load(lines + before * k + j, mask=before < count, other=0.0)[:, None]
            line -= tl.sum(part * tl.load(lines + at, mask=mask, other=0.0), 0)
            own -= tl.sum(part * tl.load(own_lines + at, mask=mask, other=0.0), 0)
        pivot = tl.sum(tl.where(column == j, line, 0.0), 0)
        scale = _root(pivot, least)
        smallest = tl.where(pivot > least, tl.minimum(smallest, pivot), smallest)
        line, own = tl.where(left >= 0, line, 0.0) * scale, own * scale
        tl.store(lines + count * k + column, line, mask=inside)
        tl.store(own_lines + count * k + column, own, mask=inside)
        tl.store(R + j * k + column, line * length, mask=inside)
        tl.store(N + column * k + j, own / length, mask=inside)
        left = tl.where((left >= 0) & (column != j), tl.maximum(left - line * line, 0.0), -1.0)
        count, most = count + 1, tl.max(left, 0)
        # The next column reads what other threads have stored.
        tl.debug_barrier()
    tl.store(closest + number, smallest)


@triton.jit
def _columns(gram, R, N, k, DEPENDENT: tl.constexpr, TWICE: tl.constexpr, K: tl.constexpr):
    """R and N of the Gram matrix number program_id(0)."""
    batch = tl.program_id(0).to(tl.int64) * k * k
    row, column = tl.arange(0, K), tl.arange(0, K)
    at = batch + row[:, None] * k + column[None, :]
    inside = (row < k)[:, None] & (column < k)[None, :]
    A = tl.load(gram + at, mask=inside, other=0.0)
    length = _lengths(gram + batch, column, k, k + 1)
    R1, N1 = _orthogonalize(A / (length[:, None] * length[None, :]), row, column, k, DEPENDENT)
    R1, N1 = R1 * length[None, :], N1 / length[:, None]
    if TWICE:
        # What is left of rounding, amplified by short columns, is gone after the second time.
        again = tl.dot(tl.trans(N1), tl.dot(A, N1, out_dtype=tl.float64), out_dtype=tl.float64)
        R2, N2 = _orthogonalize(again, row, column, k, 0.5)
        R1, N1 = tl.dot(R2, R1, out_dtype=tl.float64), tl.dot(N1, N2, out_dtype=tl.float64)
    tl.store(R + at, R1, mask=inside)
    tl.store(N + at, N1, mask=inside)


@triton.jit
def _lengths(squares, column, k, stride):
    """Return the lengths of columns whose squares stand at `squares`, 1 for those of zeros."""
    square = tl.load(squares + column * stride, mask=column < k, other=1.0)
    return tl.sqrt(tl.where(square > 0, square, 1.0))


@triton.jit
def _block(A, i, j, k, T: tl.constexpr):
    """Return (pointers to, mask of) block (i, j), T x T elements, of the k x k matrix at A."""
    row, column = i * T + tl.arange(0, T), j * T + tl.arange(0, T)
    return A + row[:, None] * k + column[None, :], (row < k)[:, None] & (column < k)[None, :]


@triton.jit
def _blocked(gram, squares, R, N, k, of_batch, of_column, least, UNIT: tl.constexpr, T: tl.constexpr):
    """`_orthogonalize` of the Gram matrix number program_id(0), by blocks of T columns.

    UNIT: `least` is a part of a column's square, in `squares` with strides (of_batch, of_column). Nothing else depends
    on the columns' lengths.
    """
    squares += tl.program_id(0).to(tl.int64) * of_batch
    batch = tl.program_id(0).to(tl.int64) * k * k
    gram += batch
    R += batch
    N += batch
    row, column = tl.arange(0, T), tl.arange(0, T)
    count = tl.cdiv(k, T)
    for j in range(count):
        # Row j of blocks: what the rows above leave of the Gram matrix, by the block on the diagonal.
        own = tl.zeros((T, T), dtype=tl.float64)
        for other in range(j, count):
            at, mask = _block(gram, j, other, k, T)
            rest = tl.load(at, mask=mask, other=0.0)
            for i in range(j):
                at, mask = _block(R, i, j, k, T)
                above = tl.load(at, mask=mask, other=0.0)
                at, mask = _block(R, i, other, k, T)
                rest -= tl.dot(tl.trans(above), tl.load(at, mask=mask, other=0.0), out_dtype=tl.float64)
            if other > j:
                rest = tl.dot(tl.trans(own), rest, out_dtype=tl.float64)
            elif UNIT:
                length = _lengths(squares, j * T + column, k, of_column)
                rest = rest / (length[:, None] * length[None, :])
                rest, own = _orthogonalize(rest, row, column, tl.minimum(T, k - j * T), least)
                rest, own = rest * length[None, :], own / length[:, None]
            else:
                rest, own = _orthogonalize(rest, row, column, tl.minimum(T, k - j * T), least)
            at, mask = _block(R, j, other, k, T)
            tl.store(at, rest, mask=mask)
        for below in range(j + 1, count):
            at, mask = _block(R, below, j, k, T)
            tl.store(at, tl.zeros((T, T), dtype=tl.float64), mask=mask)
            at, mask = _block(N, below, j, k, T)
            tl.store(at, tl.zeros((T, T), dtype=tl.float64), mask=mask)
        tl.debug_barrier()
        # Column j of blocks of N = (I - N R) own, above the diagonal.
        for i in range(j):
            total = tl.zeros((T, T), dtype=tl.float64)
            for between in range(i, j):
                at, mask = _block(N, i, between, k, T)
                left = tl.load(at, mask=mask, other=0.0)
                at, mask = _block(R, between, j, k, T)
                total -= tl.dot(left, tl.load(at, mask=mask, other=0.0), out_dtype=tl.float64)
            at, mask = _block(N, i, j, k, T)
            tl.store(at, tl.dot(total, own, out_dtype=tl.float64), mask=mask)
        at, mask = _block(N, j, j, k, T)
        tl.store(at, own, mask=mask)
        tl.debug_barrier()


def _by_blocks(gram: Tensor, squares: Tensor, least: float, unit: bool) -> tuple[Tensor, Tensor]:
    R, N = torch.empty_like(gram), torch.empty_like(gram)
    with torch.cuda.device_of(gram):
        k = gram.shape[-1]
        _blocked[(len(gram),)](
            gram, squares, R, N, k, *squares.stride(), least, UNIT=unit, T=16, num_warps=1 if k <= 64 else 2
        )  # fmt: skip
    return R, N


def independent_columns(gram: Tensor, dependent: float, twice: bool = True) -> tuple[Tensor, Tensor]:
    """Return (R, N) (B, k, k) of finite Gram matrices (B, k, k), float64.

    A column depends on those before it if they leave at most `dependent` of its square. Without the second time, A N
    is orthonormal to the rounding of A'A divided by that, some 1e-5.
    """
    batch, k, _ = gram.shape
    gram = gram.contiguous()
    if k > (64 if twice else 32):
        # Too large for the registers of one program, or slower there.
        squares = gram.diagonal(dim1=-2, dim2=-1)
        R1, N1 = _by_blocks(gram, squares, dependent, True)
        if not twice:
            return R1, N1
        R2, N2 = _by_blocks(N1.mT @ (gram @ N1), squares, 0.5, False)
        return R2 @ R1, N1 @ N2
    R, N = torch.empty_like(gram), torch.empty_like(gram)
    K = max(16, next_power_of_2(k))
    warps = {16: 1, 32: 2}.get(K, 8)
    with torch.cuda.device_of(gram):
        _columns[(batch,)](gram, R, N, k, DEPENDENT=dependent, TWICE=twice, K=K, num_warps=warps)
    return R, N


def pivoted_columns(
    gram: Tensor, squares: Tensor, least: float, share: float, enough: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (R, N) (B, k, k) of finite Gram matrices (B, k, k), whose columns have these `squares` (B, k); how close.

    All float64. `least`, `share` and `enough` are `DEPENDENT`, `SHARE` and `ENOUGH` of `mofasgd.columns`.
    """
    batch, k, _ = gram.shape
    gram = gram.contiguous()
    tried = k > 64
    R, N = _by_blocks(gram, squares, least, True) if tried else (torch.empty_like(gram), torch.empty_like(gram))
    lines, own_lines, closest = torch.empty_like(gram), torch.empty_like(gram), gram.new_empty(batch)
    K = max(16, next_power_of_2(k))
    with torch.cuda.device_of(gram):
        _pivoted[(batch,)](
            gram, squares, R, N, lines, own_lines, closest, k, *squares.stride(), least, share, enough,
            TRIED=tried, K=K, T=max(1, min(16, 4096 // K)), num_warps=max(1, min(8, K // 32)),
        )  # fmt: skip
    return R, N, closest
