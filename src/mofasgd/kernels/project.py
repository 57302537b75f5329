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

from mofasgd.kernels import interpreted, pointers
from mofasgd.kernels.common import matrix_at


@triton.jit
def _product(
    matrices, operand, result, m, n, rank, along, across,
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


def _precision(dtype: torch.dtype) -> str:
    # Three products of TF32 parts are as good as one in float32, and a tensor core makes them.
    return "tf32x3" if dtype is torch.float32 else "tf32"


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
    table, aligned = pointers(gradients, slices, m * n * some.element_size(), left.device)
    GV, GtU = left.new_empty(batch, m, rank), left.new_empty(batch, n, rank)
    dtype = some.dtype
    R = max(16, triton.next_power_of_2(rank))
    M, N, warps, stages = (64, 128, 4, 4) if R <= 64 else (128, 64, 8, 3)
    for result, operand, size, other, along, across in (
        (GV, right.to(dtype), m, n, n, 1),
        (GtU, left.to(dtype), n, m, 1, n),
    ):
        _product[(triton.cdiv(size, M), batch)](
            table, operand, result, size, other, rank, along, across,
            M=M, N=N, R=R, DTYPE=_TYPES[dtype], DOT=_operand(dtype), PRECISION=_precision(dtype), ALIGNED=aligned,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return GV, GtU
