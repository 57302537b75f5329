"""Sketches G V and G' U of a list of same-shaped gradients, accumulated in float32.

Equals `mofasgd.momentum.sketch` with U and V rounded to the gradient's dtype. Two skinny products in one launch read
every gradient twice, panel by panel, the second time from the cache. One read was tried: its parts of G' U, one a strip
of rows instead of one a panel, cost what a second read does.

Squares of G are summed by the way as the diagonal of a tile's product with itself: of a tile that is also read into
registers Triton 3.6 keeps a buffer too few, and the next one is loaded while it is multiplied.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mofasgd.kernels import cdiv, next_power_of_2, pointers
from mofasgd.kernels.common import TYPES, matrix_at, operand, precision

WIDEST = 256
"""Columns of a factor that one program multiplies by."""

_MEASURED = 64
"""Columns beside which the squares of G are summed: above, a tile's product with itself is four times as large."""

_PANEL, _CACHED = 1 << 23, 1 << 24
"""Elements of a panel, at least and at most: the panels at work must fit the cache (50 MB of an H200)."""


class Cut(NamedTuple):
    """How the kernel is cut: rows and columns of a tile of G, warps, stages; rows of a panel."""

    M: int
    N: int
    warps: int
    stages: int
    panel: int


@triton.jit
def _strip(
    A, factor, result, squares, rows, row, begin, end, exists, rank, width, along, across,
    M: tl.constexpr, N: tl.constexpr, R: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    MEASURE: tl.constexpr,
):  # fmt: skip
    """M rows of A B, summed over columns begin .. end of A with strides (along, across); B has `width` columns.

    MEASURE: and their squared lengths.
    """
    k = tl.arange(0, R)
    total = tl.zeros((M, R), dtype=tl.float32)
    if MEASURE:
        gram = tl.zeros((M, M), dtype=tl.float32)
    for start in range(begin, end, N):
        columns = start + tl.arange(0, N)
        column = (columns < end) & exists
        tile = tl.load(
            A + rows[:, None].to(tl.int64) * along + columns[None, :].to(tl.int64) * across,
            mask=row[:, None] & column[None, :],
            other=0.0,
        ).to(DOT)
        B = tl.load(
            factor + columns[:, None] * width + k[None, :], mask=column[:, None] & (k < width)[None, :], other=0.0
        ).to(DOT)
        total = tl.dot(tile, B, total, input_precision=PRECISION)
        if MEASURE:
            gram = tl.dot(tile, tl.trans(tile), gram, input_precision=PRECISION)
    tl.store(result + rows[:, None] * rank + k[None, :], total, mask=row[:, None] & (k < rank)[None, :])
    if MEASURE:
        i = tl.arange(0, M)
        # Elements beside the diagonal may be anything.
        diagonal = tl.where(i[:, None] == i[None, :], gram, 0.0)
        tl.store(squares + rows, tl.sum(diagonal, axis=1), mask=row)


@triton.jit
def _products(
    matrices, right, left, AB, parts, squares, m, n, r, q, of_right, of_left, panel, along, across,
    M: tl.constexpr, N: tl.constexpr, R: tl.constexpr, Q: tl.constexpr, DTYPE: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, ALIGNED: tl.constexpr, MEASURE: tl.constexpr,
):  # fmt: skip
    """M rows of A B, or of what `panel` rows of A (m, n) add to A'C; results of r and q columns.

    MEASURE: and the squared lengths of the rows of A.

    A has strides (along, across); B and C are stored with of_right and of_left columns. The programs of a panel follow
    each other, so that the cache still holds it for those that read it again.
    """
    batch = tl.program_id(1).to(tl.int64)
    tall = tl.cdiv(panel, M)
    each = tall + tl.cdiv(n, M)
    number, i = tl.program_id(0) // each, tl.program_id(0) % each
    begin = number * panel
    end = tl.minimum(begin + panel, m)
    A = matrix_at(matrices + batch, DTYPE, ALIGNED)
    exists = tl.load(matrices + batch) != 0
    panels = tl.num_programs(0) // each
    if i < tall:
        rows = begin + i * M + tl.arange(0, M)
        _strip(
            A, right + batch * n * of_right, AB + batch * m * r, squares + batch * m, rows, rows < end, 0, n, exists,
            r, of_right, along, across, M, N, R, DOT, PRECISION, MEASURE,
        )  # fmt: skip
    else:
        rows = (i - tall) * M + tl.arange(0, M)
        parts += (batch * panels + number) * n * q
        _strip(
            A, left + batch * m * of_left, parts, squares, rows, rows < n, begin, end, exists, q, of_left,
            across, along, M, N, Q, DOT, PRECISION, False,
        )  # fmt: skip


def sketch_list(
    gradients: Sequence[Tensor | None],
    left: Tensor,
    right: Tensor,
    squares: Tensor | None = None,
    cut: Cut | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (G V, G' U), (B, m, r) and (B, n, q) float32, of a list of gradients.

    Args:
        gradients: contiguous, of one shape and dtype, b matrices (m, n) each; None counts as zeros.
        left, right: U (B, m, q) and V (B, n, r); B = len(gradients) * b.
        squares: if given, becomes the squared lengths of G's rows, of its columns if these are more; (B, max(m, n))
            float32, in which they may vanish or overflow. For factors of up to `WIDEST` columns.
        cut: for measurements.
    """
    if right.shape[-1] > WIDEST or left.shape[-1] > WIDEST:
        return _by_blocks(gradients, left, right)
    (batch, m, q), (_, n, r) = left.shape, right.shape
    some = next(g for g in gradients if g is not None)
    dtype = some.dtype
    matrices, aligned = pointers(gradients, batch // len(gradients), m * n * some.element_size(), left.device)
    left, right, along, across = _stored(left, dtype), _stored(right, dtype), n, 1
    # Panels lie across the longer side: a sum over all of the shorter one is complete.
    swap = n > m
    if swap:
        left, right, m, n, r, q, along, across = right, left, n, m, q, r, across, along
    # 16 columns take longer than 32.
    R, Q = (max(32, next_power_of_2(width)) for width in (r, q))
    M, N, warps, stages, panel = cut or _cut(dtype, n, q, max(R, Q))
    tall = cdiv(min(panel, m), M)
    panel = tall * M
    panels = cdiv(m, panel)
    AB = torch.empty(batch, m, r, dtype=torch.float32, device=left.device)
    parts = AB.new_empty(batch, panels, n, q)
    with torch.cuda.device_of(left):
        _products[(panels * (tall + cdiv(n, M)), batch)](
            matrices, right, left, AB, parts, AB if squares is None else squares, m, n, r, q,
            right.shape[-1], left.shape[-1], panel, along, across,
            M=M, N=N, R=R, Q=Q, DTYPE=TYPES[dtype], DOT=operand(dtype), PRECISION=precision(dtype), ALIGNED=aligned,
            MEASURE=squares is not None, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    AC = parts.sum(dim=1) if panels > 1 else parts[:, 0]
    return (AC, AB) if swap else (AB, AC)


def sketch_and_measure(
    gradients: Sequence[Tensor | None], left: Tensor, right: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return what `sketch_list` does, and |G|_F^2 (B,) float64 as `norm.norms_of` takes it; None where that is dear."""
    some = next(g for g in gradients if g is not None)
    squares = None
    if some.dtype is not torch.float32 and max(left.shape[-1], right.shape[-1]) <= _MEASURED:
        squares = left.new_empty(len(left), max(left.shape[1], right.shape[1]), dtype=torch.float32)
    GV, GtU = sketch_list(gradients, left, right, squares)
    return GV, GtU, None if squares is None else squares.sum(dim=1, dtype=torch.float64)


def _by_blocks(gradients: Sequence[Tensor | None], left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Return `sketch_list` of factors wider than a program multiplies by."""
    count = max(cdiv(t.shape[-1], WIDEST) for t in (left, right))
    pairs = zip(*([part.contiguous() for part in t.chunk(count, -1)] for t in (left, right)), strict=True)
    found = [sketch_list(gradients, *pair) for pair in pairs]
    return torch.cat([one[0] for one in found], -1), torch.cat([one[1] for one in found], -1)


def _cut(dtype: torch.dtype, n: int, q: int, columns: int) -> Cut:
    """Return how to multiply a panel's rows of n elements by factors of up to `columns` and q columns."""
    rows = max(_PANEL // n, 32 * q)
    # Its sums, float32, are then an eighth of what need not be read again.
    panel = rows if rows * n <= _CACHED else 1 << 31
    if dtype is torch.float32:
        return Cut(64, 64, 4, 2, panel)
    return Cut(64, 128, 4, 4, panel) if columns <= 64 else Cut(128, 64, 8, 3, panel)


def _stored(factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a factor as the kernel reads it: in `dtype`; a width like 145 padded with zeros to a multiple of 16."""
    width = factor.shape[-1]
    if width <= 32 or width % 16 == 0:
        return factor.to(dtype).contiguous()
    # Rows of another width are not aligned, and each of their elements would be a load of its own.
    stored = factor.new_zeros(*factor.shape[:-1], -width % 16 + width, dtype=dtype)
    stored[..., :width] = factor
    return stored
