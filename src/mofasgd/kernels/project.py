"""Sketches G V and G' U of a list of same-shaped gradients, accumulated in float32.

Equals `mofasgd.momentum.sketch` with U and V rounded to the gradient's dtype. Two skinny products, one launch each,
read every gradient twice. One read was tried: its parts of G' U, one a strip of rows, cost what the second read does.
The first of them sums the squares of G where they are asked for.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mofasgd.kernels import pointers
from mofasgd.kernels.common import TYPES, matrix_at, operand, precision

WIDEST = 256
"""Columns of a factor that one program multiplies by."""

_UP, _DOWN = 2.0**60, 2.0**-48
"""Scales at which float32 sums the squares of G: that of the small is right until it overflows, at a norm of 16, where
that of the large, which may be 1e33, has long been right."""


@triton.jit
def _rows(factor, at, real, k, rank):
    """Return rows `at` of a factor in its columns `k`, zeros outside."""
    return tl.load(factor + at[:, None] * rank + k[None, :], mask=real[:, None] & (k < rank)[None, :], other=0.0)


@triton.jit
def _product(
    matrices, factor, result, squares, m, n, rank, along, across,
    M: tl.constexpr, N: tl.constexpr, R: tl.constexpr, MORE: tl.constexpr, SQUARES: tl.constexpr,
    UP: tl.constexpr, DOWN: tl.constexpr, DTYPE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """M rows of A B, with A (m, n) at strides (along, across) of matrix `batch` and B (n, rank), rank <= R + MORE."""
    batch = tl.program_id(1).to(tl.int64)
    rows, k = tl.program_id(0) * M + tl.arange(0, M), tl.arange(0, R)
    row = rows < m
    A = matrix_at(matrices + batch, DTYPE, ALIGNED)
    exists = tl.load(matrices + batch) != 0
    factor += batch * n * rank
    total = tl.zeros((M, R), dtype=tl.float32)
    if MORE > 0:
        j = R + tl.arange(0, MORE)
        rest = tl.zeros((M, MORE), dtype=tl.float32)
    if SQUARES:
        small, large = tl.zeros((M, N), dtype=tl.float32), tl.zeros((M, N), dtype=tl.float32)
    for start in range(0, n, N):
        columns = start + tl.arange(0, N)
        column = (columns < n) & exists
        tile = tl.load(
            A + rows[:, None].to(tl.int64) * along + columns[None, :].to(tl.int64) * across,
            mask=row[:, None] & column[None, :],
            other=0.0,
        ).to(DOT)
        B = _rows(factor, columns, column, k, rank).to(DOT)
        total = tl.dot(tile, B, total, input_precision=PRECISION)
        if MORE > 0:
            B = _rows(factor, columns, column, j, rank).to(DOT)
            rest = tl.dot(tile, B, rest, input_precision=PRECISION)
        if SQUARES:
            up, down = tile.to(tl.float32) * UP, tile.to(tl.float32) * DOWN
            small += up * up
            large += down * down
    at = result + batch * m * rank + rows[:, None] * rank
    tl.store(at + k[None, :], total, mask=row[:, None] & (k < rank)[None, :])
    if MORE > 0:
        tl.store(at + j[None, :], rest, mask=row[:, None] & (j < rank)[None, :])
    if SQUARES:
        squares += (batch * tl.num_programs(0) + tl.program_id(0)) * 2
        tl.store(squares, tl.sum(tl.sum(small, 1), 0))
        tl.store(squares + 1, tl.sum(tl.sum(large, 1), 0))


def sketch_list(gradients: Sequence[Tensor | None], left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Return (G V, G' U), (B, m, r) and (B, n, q) float32, of a list of gradients.

    Args:
        gradients: contiguous, of one shape and dtype, b matrices (m, n) each; None counts as zeros.
        left, right: U (B, m, q) and V (B, n, r), contiguous; B = len(gradients) * b.
    """
    return _sketches(gradients, left, right, measure=False)[:2]


def sketch_and_measure(
    gradients: Sequence[Tensor | None], left: Tensor, right: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `sketch_list` does and |G|_F, (B,) float64, which is infinite above 1e33."""
    GV, GtU, squares = _sketches(gradients, left, right, measure=True)
    small, large = squares.double().unbind(dim=-1)
    return GV, GtU, torch.where(small < torch.inf, small * _UP**-2, large * _DOWN**-2).sum(dim=1).sqrt()


def _sketches(
    gradients: Sequence[Tensor | None], left: Tensor, right: Tensor, *, measure: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (G V, G' U), and the squares of `_multiply`."""
    (batch, m, _), n = left.shape, right.shape[1]
    some = next(g for g in gradients if g is not None)
    table = pointers(gradients, batch // len(gradients), m * n * some.element_size(), left.device)
    GV, squares = _multiply(table, right.to(some.dtype), (m, n), (n, 1), measure=measure)
    GtU, _ = _multiply(table, left.to(some.dtype), (n, m), (1, n))
    return GV, GtU, squares


def _widths(rank: int) -> tuple[int, int]:
    """Return columns of the two blocks that a program multiplies by, powers of two; the second may be 0.

    Two pad a rank like 72 to 80 columns instead of 128. 16 columns alone take longer than 32.
    """
    whole = max(32, triton.next_power_of_2(rank))
    more = max(16, triton.next_power_of_2(max(1, rank - whole // 2)))
    return (whole // 2, more) if whole > 32 and more < whole // 2 else (whole, 0)


def _multiply(
    table: tuple[Tensor, bool],
    factor: Tensor,
    shape: tuple[int, int],
    strides: tuple[int, int],
    *,
    measure: bool = False,
    cut: tuple[int, int, int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return A B (B, m, r) of matrices A (m, n) with `strides` and a factor B (B, n, r) of their dtype.

    Beside it, to be read if `measure`, squares of A summed over each program's rows at both scales, (B, programs, 2).
    `cut` (rows, columns, warps, stages) is for measurements.
    """
    matrices, aligned = table
    dtype, batch, (m, n), rank = factor.dtype, len(factor), shape, factor.shape[-1]
    if rank > WIDEST:
        first, *others = (part.contiguous() for part in factor.split(WIDEST, -1))
        product, squares = _multiply(table, first, shape, strides, measure=measure, cut=cut)
        return torch.cat([product, *(_multiply(table, other, shape, strides)[0] for other in others)], -1), squares
    R, more = _widths(rank)
    M, N, warps, stages = cut or (
        (64, 64, 4, 2) if dtype is torch.float32 else (64, 128, 4, 4) if R + more <= 64 else (128, 64, 8, 3)
    )
    programs = triton.cdiv(m, M)
    result = torch.empty(batch, m, rank, dtype=torch.float32, device=factor.device)
    squares = result.new_empty(batch, programs, 2)
    with torch.cuda.device_of(factor):
        _product[(programs, batch)](
            matrices, factor, result, squares, m, n, rank, *strides,
            M=M, N=N, R=R, MORE=more, SQUARES=measure, UP=_UP, DOWN=_DOWN, DTYPE=TYPES[dtype], DOT=operand(dtype),
            PRECISION=precision(dtype), ALIGNED=aligned, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return result, squares
