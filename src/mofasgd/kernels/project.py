"""Sketches G V and G' U of a list of same-shaped gradients, accumulated in float32.

Equals `mofasgd.momentum.sketch` with U and V rounded to the gradient's dtype. Up to rank 64 one kernel reads every
gradient once: a program keeps the sums G V of its strip of rows in registers while it runs along the columns, and
writes what its strip adds to G' U. These parts are added up afterwards, in a fixed order. At larger ranks they would be
larger than the gradient, and two skinny products read it twice.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mofasgd.kernels import interpreted, pointers

_SCRATCH = 1 << 26
"""Elements of partial sums that are held at a time (256 MiB)."""


@triton.jit
def _project(
    gradients, left, right, parts_right, parts_left, m, n, rank, chunk,
    M: tl.constexpr, N: tl.constexpr, R: tl.constexpr, DTYPE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A strip of M rows and `chunk` columns of matrix `batch`: its part of G V (m, r) and of G' U (n, r)."""
    batch = tl.program_id(2).to(tl.int64)
    strip, part = tl.program_id(0), tl.program_id(1)
    rows, k = strip * M + tl.arange(0, M), tl.arange(0, R)
    row = rows < m
    G = tl.load(gradients + batch).to(tl.pointer_type(DTYPE))
    exists = tl.load(gradients + batch) != 0

    U = tl.load(
        left + batch * m * rank + rows[:, None] * rank + k[None, :], mask=row[:, None] & (k < rank)[None, :], other=0.0
    ).to(DOT)
    GV = tl.zeros((M, R), dtype=tl.float32)
    for start in range(part * chunk, tl.minimum(part * chunk + chunk, n), N):
        columns = start + tl.arange(0, N)
        column = (columns < n) & exists
        V = tl.load(
            right + batch * n * rank + columns[:, None] * rank + k[None, :],
            mask=column[:, None] & (k < rank)[None, :],
            other=0.0,
        ).to(DOT)
        tile = tl.load(
            G + rows[:, None].to(tl.int64) * n + columns[None, :], mask=row[:, None] & column[None, :], other=0.0
        ).to(DOT)
        GV = tl.dot(tile, V, GV, input_precision=PRECISION)
        GtU = tl.dot(tl.trans(tile), U, input_precision=PRECISION)
        at = parts_left + (batch * tl.num_programs(0) + strip) * n * rank + columns[:, None] * rank + k[None, :]
        tl.store(at, GtU, mask=(columns < n)[:, None] & (k < rank)[None, :])
    at = parts_right + (batch * tl.num_programs(1) + part) * m * rank + rows[:, None] * rank + k[None, :]
    tl.store(at, GV, mask=row[:, None] & (k < rank)[None, :])


@triton.jit
def _skinny(
    matrices, operand, result, m, n, rank, along, across,
    M: tl.constexpr, N: tl.constexpr, R: tl.constexpr, DTYPE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """M rows of A B, with A (m, n) at strides (along, across) of matrix `batch` and B (n, r)."""
    batch = tl.program_id(1).to(tl.int64)
    rows, k = tl.program_id(0) * M + tl.arange(0, M), tl.arange(0, R)
    row = rows < m
    A = tl.load(matrices + batch).to(tl.pointer_type(DTYPE))
    exists = tl.load(matrices + batch) != 0
    total = tl.zeros((M, R), dtype=tl.float32)
    for start in range(0, n, N):
        columns = start + tl.arange(0, N)
        column = (columns < n) & exists
        tile = tl.load(
            A + rows[:, None].to(tl.int64) * along + columns[None, :].to(tl.int64) * across,
            mask=row[:, None] & column[None, :],
            other=0.0,
        ).to(DOT)
        B = tl.load(
            operand + batch * n * rank + columns[:, None] * rank + k[None, :],
            mask=column[:, None] & (k < rank)[None, :],
            other=0.0,
        ).to(DOT)
        total = tl.dot(tile, B, total, input_precision=PRECISION)
    at = result + batch * m * rank + rows[:, None] * rank + k[None, :]
    tl.store(at, total, mask=row[:, None] & (k < rank)[None, :])


_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def _operand(dtype: torch.dtype) -> tl.dtype:
    # The interpreter multiplies the bits of bfloat16; in float32 the products are the same.
    return tl.float32 if interpreted() else _TYPES[dtype]


def sketch_list(gradients: Sequence[Tensor | None], left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Return (G V, G' U), (B, m, r) and (B, n, r) float32, of a list of gradients.

    Args:
        gradients: contiguous, of one shape and dtype, b matrices (m, n) each; None counts as zeros.
        left, right: U (B, m, r) and V (B, n, r), float32, contiguous; B = len(gradients) * b.
    """
    batch, m, rank = left.shape
    n = right.shape[1]
    some = next(g for g in gradients if g is not None)
    slices = batch // len(gradients)
    table = pointers(gradients, slices, m * n * some.element_size(), left.device)
    if rank <= 64:
        return _one_pass(table, some.dtype, left, right)
    return _two_passes(table, some.dtype, left, right)


def _one_pass(table: Tensor, dtype: torch.dtype, left: Tensor, right: Tensor, config=None) -> tuple[Tensor, Tensor]:
    batch, m, rank = left.shape
    n = right.shape[1]
    R = max(16, triton.next_power_of_2(rank))
    M, N, warps, stages = config or ((512, 64, 8, 3) if R <= 32 else (256, 64, 8, 3))
    strips = triton.cdiv(m, M)
    # Enough programs to fill the device, few enough that the parts of G V stay small.
    chunks = max(1, min(triton.cdiv(n, 512), triton.cdiv(512, strips * batch)))
    chunk = triton.cdiv(triton.cdiv(n, chunks), N) * N
    chunks = triton.cdiv(n, chunk)
    GV, GtU = left.new_empty(batch, m, rank), left.new_empty(batch, n, rank)
    some = max(1, _SCRATCH // (rank * (strips * n + chunks * m)))
    for i in range(0, batch, some):
        U, V = left[i : i + some].to(dtype), right[i : i + some].to(dtype)
        count = len(U)
        parts_right = left.new_empty(count, chunks, m, rank) if chunks > 1 else GV[i : i + some, None]
        parts_left = left.new_empty(count, strips, n, rank) if strips > 1 else GtU[i : i + some, None]
        _project[(strips, chunks, count)](
            table[i : i + some], U, V, parts_right, parts_left, m, n, rank, chunk,
            M=M, N=N, R=R, DTYPE=_TYPES[dtype], DOT=_operand(dtype), PRECISION="ieee" if dtype is torch.float32 else "tf32",
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
        if chunks > 1:
            torch.sum(parts_right, dim=1, out=GV[i : i + some])
        if strips > 1:
            torch.sum(parts_left, dim=1, out=GtU[i : i + some])
    return GV, GtU


def _two_passes(table: Tensor, dtype: torch.dtype, left: Tensor, right: Tensor, config=None) -> tuple[Tensor, Tensor]:
    batch, m, rank = left.shape
    n = right.shape[1]
    GV, GtU = left.new_empty(batch, m, rank), left.new_empty(batch, n, rank)
    R = max(16, triton.next_power_of_2(rank))
    M, N, warps, stages = config or ((128, 64, 8, 3) if R <= 128 else (64, 64, 8, 3))
    precision = "ieee" if dtype is torch.float32 else "tf32"
    for out, operand, size, other, along, across in (
        (GV, right.to(dtype), m, n, n, 1),
        (GtU, left.to(dtype), n, m, 1, n),
    ):
        _skinny[(triton.cdiv(size, M), batch)](
            table, operand, out, size, other, rank, along, across,
            M=M, N=N, R=R, DTYPE=_TYPES[dtype], DOT=_operand(dtype), PRECISION=precision, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return GV, GtU
