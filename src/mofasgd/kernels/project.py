"""Sketches G V and G' U of a list of same-shaped gradients, accumulated in float32.

Equals `mofasgd.momentum.sketch` with U and V rounded to the gradient's dtype. Two skinny products, one launch each,
read every gradient twice. One read was tried: its parts of G' U, one a strip of rows, cost what the second read does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mofasgd.kernels import pointers
from mofasgd.kernels.common import TYPES, matrix_at, operand, precision


@triton.jit
def _product(
    matrices, factor, result, m, n, rank, along, across,
    M: tl.constexpr, N: tl.constexpr, R: tl.constexpr, DTYPE: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """M rows of A B, with A (m, n) at strides (along, across) of matrix `batch` and B (n, r)."""
    batch = tl.program_id(1).to(tl.int64)
    rows, k = tl.program_id(0) * M + tl.arange(0, M), tl.arange(0, R)
    row = rows < m
    A = matrix_at(matrices + batch, DTYPE, ALIGNED)
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
            factor + batch * n * rank + columns[:, None] * rank + k[None, :],
            mask=column[:, None] & (k < rank)[None, :],
            other=0.0,
        ).to(DOT)
        total = tl.dot(tile, B, total, input_precision=PRECISION)
    at = result + batch * m * rank + rows[:, None] * rank + k[None, :]
    tl.store(at, total, mask=row[:, None] & (k < rank)[None, :])


WIDEST = 256
"""Columns of a factor that one program multiplies by."""


def sketch_list(gradients: Sequence[Tensor | None], left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Return (G V, G' U), (B, m, r) and (B, n, q) float32, of a list of gradients.

    Args:
        gradients: contiguous, of one shape and dtype, b matrices (m, n) each; None counts as zeros.
        left, right: U (B, m, q) and V (B, n, r), contiguous; B = len(gradients) * b.
    """
    batch, m, _ = left.shape
    n = right.shape[1]
    some = next(g for g in gradients if g is not None)
    table = pointers(gradients, batch // len(gradients), m * n * some.element_size(), left.device)
    GV = _multiply(table, right.to(some.dtype), (m, n), (n, 1))
    return GV, _multiply(table, left.to(some.dtype), (n, m), (1, n))


def _multiply(table: tuple[Tensor, bool], factor: Tensor, shape: tuple[int, int], strides: tuple[int, int]) -> Tensor:
    """Return A B (B, m, r) of matrices A (m, n) with `strides` and a factor B (B, n, r) of their dtype."""
    matrices, aligned = table
    dtype, batch, (m, n), rank = factor.dtype, len(factor), shape, factor.shape[-1]
    if rank > WIDEST:
        return torch.cat([_multiply(table, part.contiguous(), shape, strides) for part in factor.split(WIDEST, -1)], -1)
    # A product 16 columns wide takes longer than one of 32.
    R = max(32, triton.next_power_of_2(rank))
    narrow = R <= 64 and dtype is not torch.float32
    M, N, warps, stages = (64, 128, 4, 4) if narrow else (64, 64, 4, 2) if dtype is torch.float32 else (128, 64, 8, 3)
    result = torch.empty(batch, m, rank, dtype=torch.float32, device=factor.device)
    with torch.cuda.device_of(factor):
        _product[(triton.cdiv(m, M), batch)](
            matrices, factor, result, m, n, rank, *strides,
            M=M, N=N, R=R, DTYPE=TYPES[dtype], DOT=operand(dtype), PRECISION=precision(dtype), ALIGNED=aligned,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return result
