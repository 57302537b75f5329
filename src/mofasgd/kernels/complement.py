"""Two passes over a list of same-shaped gradients for the complement; torch's part is in `mofasgd.residual`.

`row_squares` and `apply_complement` see the residual R = G - A B' only tile by tile. The second equals
`mofasgd.apply.apply_update` with `extra` = diag(scales) R, up to the rounding of the products.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mofasgd.kernels import cdiv, pointers
from mofasgd.kernels.apply import turned
from mofasgd.kernels.common import TYPES, Tiles, block, matrix_at, operand, precision, stochastic_bfloat16, tile_halves


@triton.jit
def _below(index, size, EXACT: tl.constexpr):
    """Return which indices are below `size`; EXACT: all of them, of which the compiler then knows."""
    if EXACT:
        return tl.full(index.shape, True, tl.int1)
    return index < size


@triton.jit
def _first(left, rows, row, inner: tl.constexpr, R: tl.constexpr):
    """Return the first R columns of these rows of A; a loop that stores does not hoist what it loads itself."""
    k = tl.arange(0, R)
    mask = row[:, None] & _below(k, inner, inner % R == 0)[None, :]
    return tl.load(left + rows[:, None] * inner + k[None, :], mask=mask, other=0.0)


@triton.jit
def _taken(
    first, left, right, rows, columns, row, column, product, inner: tl.constexpr, R: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Return a tile of A B'; `first` is of `_first`, `product` a tile of zeros."""
    if inner <= R:
        # No loop here lets one around it overlap loads with products.
        k = tl.arange(0, R)
        mask = column[None, :] & _below(k, inner, inner % R == 0)[:, None]
        B = tl.load(right + columns[None, :] * inner + k[:, None], mask=mask, other=0.0)
        product = tl.dot(first, B, product, input_precision=PRECISION)
    else:
        for start in range(0, inner, R):
            k = start + tl.arange(0, R)
            real = _below(k, inner, inner % R == 0)
            A = tl.load(left + rows[:, None] * inner + k[None, :], mask=row[:, None] & real[None, :], other=0.0)
            B = tl.load(right + columns[None, :] * inner + k[:, None], mask=column[None, :] & real[:, None], other=0.0)
            product = tl.dot(A, B, product, input_precision=PRECISION)
    return product


@triton.jit
def _squares(
    gradients, left, right, inverse, lengths, squares, terms, m, n, along, across, inner: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, R: tl.constexpr, CHUNK: tl.constexpr, GRADIENT: tl.constexpr,
    ALIGNED: tl.constexpr, WIDE: tl.constexpr, EXACT: tl.constexpr, SCALE: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Squared lengths of M rows of R and of G in CHUNK columns; G (m, n) has strides (along, across).

    The first chunk's program adds those of what the product takes away, sum_k A_ik^2 |B_k|^2.
    """
    batch, part = tl.program_id(2).to(tl.int64), tl.program_id(1)
    rows = tl.program_id(0) * M + tl.arange(0, M)
    row = _below(rows, m, EXACT)
    G = matrix_at(gradients + batch, GRADIENT, ALIGNED)
    factor = tl.load(inverse + batch)
    # A matrix that is not finite has none.
    exists = (tl.load(gradients + batch) != 0) & (factor != 0)
    left += batch * m * inner
    right += batch * n * inner
    A = _first(left, rows, row, inner, R)

    # Summed element by element: a sum over columns in the loop would take longer than the rest of it.
    of_R, of_G = tl.zeros((M, N), dtype=tl.float32), tl.zeros((M, N), dtype=tl.float32)
    begin = part * CHUNK
    for start in tl.range(begin, tl.minimum(begin + CHUNK, n), N, num_stages=STAGES):
        columns = start + tl.arange(0, N)
        column = _below(columns, n, EXACT)
        if WIDE:
            inside = rows.to(tl.int64)[:, None] * along + columns.to(tl.int64)[None, :] * across
        else:
            inside = rows[:, None] * along + columns[None, :] * across
        # Read before the products, so that they hide its latency.
        tile = tl.load(G + inside, mask=row[:, None] & column[None, :] & exists, other=0.0).to(tl.float32) * factor
        product = _taken(
            A, left, right, rows, columns, row, column, tl.zeros((M, N), dtype=tl.float32), inner, R, PRECISION
        )
        rest = tile - product * SCALE
        of_R += rest * rest
        # G from R: its squares would be summed in the layout of the load, which costs a second conversion.
        whole = rest + product * SCALE
        of_G += whole * whole
    result = squares + (batch * tl.num_programs(1) + part) * 2 * m + rows
    tl.store(result, tl.sum(of_R, axis=1), mask=row)
    tl.store(result + m, tl.sum(of_G, axis=1), mask=row)
    if part == 0:
        total = tl.zeros((M,), dtype=tl.float32)
        for start in range(0, inner, R):
            k = start + tl.arange(0, R)
            real = _below(k, inner, inner % R == 0)
            A = tl.load(left + rows[:, None] * inner + k[None, :], mask=row[:, None] & real[None, :], other=0.0)
            length = tl.load(lengths + batch * inner + k, mask=real, other=0.0) * SCALE
            total += tl.sum(A.to(tl.float32) * (A.to(tl.float32) * length[None, :]), axis=1)
        tl.store(terms + batch * m + rows, total * SCALE, mask=row)


def _square_tiles(inner: int) -> Tiles:
    """Return the tiles for `inner` columns of float16 factors, 0: of float32."""
    if inner == 0:
        return Tiles(64, 64, 32, 2048, 8, 2)
    if inner <= 128:
        return Tiles(128, 64, 128, 4096, 8, 3)
    if inner <= 256:
        return Tiles(128, 64, 256, 4096, 8, 3)
    # All columns of the factors at once, where shared memory has room for them.
    return Tiles(64, 32, 512, 2048, 4, 3) if inner <= 512 else Tiles(128, 64, 128, 2048, 8, 2)


def row_squares(
    gradients: Sequence[Tensor | None],
    residual: tuple[Tensor, Tensor, Tensor, float, Tensor, Tensor, Tensor],
    *,
    transposed: bool,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor]:
    """Return squared lengths of the rows of R and of G, in parts of columns (B, parts, 2, m); and of terms (B, m).

    The terms are sum_k A_ik^2 |B_k|^2 of the residual's factors. All are in its unit, float32.

    Args:
        gradients: contiguous, of one shape and dtype (float32 or bfloat16), b matrices (m, n) each; None counts as
            zeros.
        residual: a `residual.Residual`.
        transposed: columns take the place of rows; m is n then.
        tiles: for measurements.
    """
    left, right, inverse, scale, of_left, of_right, _ = residual
    batch, m, inner = left.shape
    n = right.shape[1]
    some = next(g for g in gradients if g is not None)
    table, aligned = pointers(gradients, batch // len(gradients), m * n * some.element_size(), left.device)
    along, across = n, 1
    if transposed:
        left, right, of_right, m, n, along, across = right, left, of_left, n, m, across, along
    t = tiles or _square_tiles(inner if left.dtype is torch.float16 else 0)
    parts = cdiv(n, t.chunk)
    squares = left.new_empty(batch, parts, 2, m, dtype=torch.float32)
    terms = squares.new_empty(batch, m)
    with torch.cuda.device_of(left):
        _squares[(cdiv(m, t.M), parts, batch)](
            table, left, right, inverse, of_right, squares, terms, m, n, along, across, inner,
            M=t.M, N=t.N, R=block(inner, t.R), CHUNK=t.chunk, GRADIENT=TYPES[some.dtype], ALIGNED=aligned,
            WIDE=m * n >= 2**31, EXACT=m % t.M == 0 and n % t.N == 0, SCALE=scale, PRECISION=precision(left.dtype),
            STAGES=t.stages, num_warps=t.warps,
        )  # fmt: skip
    return squares, terms


@triton.jit
def _scales(
    squares, terms, floor, scales, m, parts, noise, root, NOISE_OF_TERMS: tl.constexpr, M: tl.constexpr
):  # fmt: skip
    """a_i of M rows."""
    batch = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * M + tl.arange(0, M)
    row = rows < m
    squares += batch * parts * 2 * m + rows
    of_R, of_G = tl.zeros((M,), dtype=tl.float32), tl.zeros((M,), dtype=tl.float32)
    for part in range(parts):
        of_R += tl.load(squares + part * 2 * m, mask=row, other=0.0)
        of_G += tl.load(squares + (part * 2 + 1) * m, mask=row, other=0.0)
    least = tl.sqrt(of_G) * noise
    if NOISE_OF_TERMS:
        least = tl.maximum(least, tl.sqrt(tl.load(terms + batch * m + rows, mask=row, other=0.0)) * noise)
    length = tl.sqrt(of_R)
    # An infinite length makes 0, too.
    real = (length > least) & (length > tl.load(floor + batch))
    tl.store(scales + batch * m + rows, tl.where(real, 1 / (tl.where(real, length, 1.0) * root), 0.0), mask=row)


def scales_of(squares: Tensor, terms: Tensor | None, floor: Tensor, noise: float) -> Tensor:
    """Return 1 / (|R_i| sqrt(m)) (B, m) float32; 0 where |R_i| <= floor, or <= noise of |G_i| or of the terms.

    Args:
        squares: (B, parts, 2, m), of R and G, and terms (B, m) or None, from `row_squares`.
        floor: (B,) float32.
        noise: share.
    """
    batch, parts, _, m = squares.shape
    scales = squares.new_empty(batch, m)
    with torch.cuda.device_of(squares):
        _scales[(cdiv(m, 256), batch)](
            squares, scales if terms is None else terms, floor, scales, m, parts, noise, math.sqrt(m),
            NOISE_OF_TERMS=terms is not None, M=256,
        )  # fmt: skip
    return scales


@triton.jit
def _apply(
    weights, gradients, residual_left, residual_right, inverse, scales, left, right, keep, keys, steps,
    m, n, slices, inner: tl.constexpr, rank: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, R: tl.constexpr, F: tl.constexpr,
    CHUNK: tl.constexpr, WEIGHT: tl.constexpr, GRADIENT: tl.constexpr, STOCHASTIC: tl.constexpr,
    TRANSPOSED: tl.constexpr, WEIGHT_ALIGNED: tl.constexpr, GRADIENT_ALIGNED: tl.constexpr, EVEN: tl.constexpr,
    WIDE: tl.constexpr, EXACT: tl.constexpr, SCALE: tl.constexpr, RESIDUAL_PRECISION: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """M rows by CHUNK columns of matrix `batch`, N at a time; R columns of the residual's factors, F of the others."""
    batch = tl.program_id(1).to(tl.int64)
    strips = tl.cdiv(n, CHUNK)
    rows = (tl.program_id(0) // strips) * M + tl.arange(0, M)
    begin = (tl.program_id(0) % strips) * CHUNK
    row = _below(rows, m, EXACT)
    W = matrix_at(weights + batch, WEIGHT, WEIGHT_ALIGNED)
    G = matrix_at(gradients + batch, GRADIENT, GRADIENT_ALIGNED)
    factor, kept = tl.load(inverse + batch), tl.load(keep + batch)
    # What is not finite must not reach a weight, by a factor of 0 either.
    exists = (tl.load(gradients + batch) != 0) & (factor != 0)
    param, before = batch // slices, (batch % slices) * m * n
    step = tl.load(steps + param)
    residual_left += batch * m * inner
    residual_right += batch * n * inner
    A = _first(residual_left, rows, row, inner, R)
    left += batch * m * rank
    right += batch * n * rank
    k = tl.arange(0, F)
    if rank <= F:
        L = _first(left, rows, row, rank, F)
    if not TRANSPOSED:
        scale = tl.load(scales + batch * m + rows, mask=row, other=0.0)[:, None]

    # The loop lets the next tile be read while this one is multiplied.
    for first in tl.range(begin, tl.minimum(begin + CHUNK, n), N, num_stages=STAGES):
        columns = first + tl.arange(0, N)
        column = _below(columns, n, EXACT)
        inside = (rows.to(tl.int64) if WIDE else rows)[:, None] * n + columns[None, :]
        mask = row[:, None] & column[None, :]
        tile = tl.load(G + inside, mask=mask & exists, other=0.0).to(tl.float32) * factor
        value = tl.load(W + inside, mask=mask, other=0.0).to(tl.float32)
        product = _taken(
            A, residual_left, residual_right, rows, columns, row, column, tl.zeros((M, N), dtype=tl.float32),
            inner, R, RESIDUAL_PRECISION,
        )  # fmt: skip
        if TRANSPOSED:
            scale = tl.load(scales + batch * n + columns, mask=column, other=0.0)[None, :]
        # A row that does not move may hold more than float32 does.
        update = tl.where(scale != 0, (tile - product * SCALE) * scale, 0.0)

        if rank <= F:
            T_mask = _below(k, rank, rank % F == 0)[:, None] & column[None, :]
            T = tl.load(right + k[:, None] * n + columns[None, :], mask=T_mask, other=0.0)
            update = tl.dot(L.to(DOT), T.to(DOT), update, input_precision=PRECISION)
        else:
            for start in range(0, rank, F):
                j = start + k
                real = _below(j, rank, rank % F == 0)
                near = tl.load(left + rows[:, None] * rank + j[None, :], mask=row[:, None] & real[None, :], other=0.0)
                T = tl.load(right + j[:, None] * n + columns[None, :], mask=real[:, None] & column[None, :], other=0.0)
                update = tl.dot(near.to(DOT), T.to(DOT), update, input_precision=PRECISION)

        value = value * kept - update
        if STOCHASTIC:
            halves = tile_halves(keys + 2 * param, step, before, rows, first, n, N, EVEN)
            tl.store(W + inside, stochastic_bfloat16(value, halves), mask=mask)
        else:
            tl.store(W + inside, value.to(WEIGHT), mask=mask)


def _apply_tiles(inner: int) -> Tiles:
    """Return the tiles for `inner` columns of float16 factors, 0: of float32."""
    if inner == 0:
        return Tiles(64, 64, 32, 512, 8, 2)
    if inner <= 128:
        return Tiles(128, 64, 128, 1024, 8, 3)
    if inner <= 256:
        return Tiles(128, 32, 256, 1024, 8, 3)
    return Tiles(64, 32, 512, 1024, 4, 3) if inner <= 512 else Tiles(64, 64, 128, 512, 4, 2)


def apply_complement(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    residual: tuple[Tensor, Tensor, Tensor, float, Tensor, Tensor, Tensor],
    scales: Tensor,
    left: Tensor,
    right: Tensor,
    keep: Tensor,
    keys: Tensor,
    steps: Tensor,
    *,
    stochastic: bool,
    transposed: bool = False,
    tiles: Tiles | None = None,
) -> None:
    """Set W <- keep W - (left right' + diag(scales) R) for every matrix, in place, in one launch.

    Args:
        weights: contiguous parameters of one shape and dtype (float32 or bfloat16), b matrices (m, n) each.
        gradients: as in `row_squares`.
        residual: a `residual.Residual` of these gradients.
        scales: (B, m), of the rows of R * inverse: rate * c sqrt(min(m, n)) * `residual.row_scales`, 0 for a matrix
            that does not move, whose gradient may then be anything.
        left, right: (B, m, r), (B, n, r); B = len(weights) * b. As in `apply.apply_factored`.
        keep: (B,), float32, what decay leaves.
        keys: (len(weights), 2) int32, rows of `rng.key_tensor`.
        steps: (len(weights),), number of the step.
        stochastic: round bfloat16 at random.
        transposed: scale the columns of R, by scales (B, n).
        tiles: for measurements.
    """
    A, B, inverse, scale = residual[:4]
    batch, m, rank = left.shape
    n, inner = right.shape[1], A.shape[2]
    slices = batch // len(weights)
    dtype, of = weights[0].dtype, next(g.dtype for g in gradients if g is not None)
    weight_table, weight_aligned = pointers(weights, slices, m * n * dtype.itemsize, left.device)
    gradient_table, gradient_aligned = pointers(gradients, slices, m * n * of.itemsize, left.device)
    low = dtype is torch.bfloat16 and of is torch.bfloat16
    t = tiles or _apply_tiles(inner if A.dtype is torch.float16 else 0)
    # Cast here, as by `apply_factored`.
    left, right = left.to(dtype).contiguous(), turned(right, dtype)
    with torch.cuda.device_of(left):
        _apply[(cdiv(m, t.M) * cdiv(n, t.chunk), batch)](
            weight_table, gradient_table, A, B, inverse, scales, left, right, keep, keys, steps,
            m, n, slices, inner, rank, M=t.M, N=t.N, R=block(inner, t.R), F=block(rank, 128 if low else 32),
            CHUNK=t.chunk, WEIGHT=TYPES[dtype], GRADIENT=TYPES[of],
            STOCHASTIC=stochastic and dtype is torch.bfloat16, TRANSPOSED=transposed, WEIGHT_ALIGNED=weight_aligned,
            GRADIENT_ALIGNED=gradient_aligned, EVEN=n % 2 == 0, WIDE=m * n >= 2**31,
            EXACT=m % t.M == 0 and n % t.N == 0, SCALE=scale, RESIDUAL_PRECISION=precision(A.dtype),
            DOT=operand(dtype), PRECISION=precision(dtype), STAGES=t.stages, num_warps=t.warps,
        )  # fmt: skip
    torch.autograd.graph.increment_version(weights)
