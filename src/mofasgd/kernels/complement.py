"""The step with the normalized complement for a list of same-shaped weights; no matrix of their size is made.

Equals `mofasgd.complement.normalized_complement` and `mofasgd.apply.apply_update` with it. In three calls:

    residual_factors   R = G - [Q H] [T P]',  T = G'Q,  H = G P - Q T'P      two reads of G, by `project.sketch_list`
    row_scales         a_i = 1 / (|R_i| sqrt(m)), or 0 for what is no direction       one read of G
    apply_complement   W <- keep W - (L diag(c) V' + diag(scales) R)                  one read of G, W in place

Between the last two the caller makes `scales` of a and his rate, for which `lr_scale` may need `square_norm`.

What is left of a row may be a thousandth of it, so the rounding of what is taken away counts:

* bfloat16 sketches are products with Q and P *rounded*. Taken as G P and G'Q they leave up to 2e-3 of the seen part
  behind (4e-4 if it is spread over 512 columns). T and H are therefore those of the oblique projectors
  I - Q (Qr'Q)^-1 Qr' and I - Pr (P'Pr)^-1 P', Qr and Pr the rounded bases: they need the same sketches and take all of
  the seen part away. What they change is 5e-4 of what is left.
* The factors of a bfloat16 gradient are float16, with powers of two that keep them in its range: 11 bits leave 3e-4
  (root mean square) of what is taken away, NOISE being 1e-3. TF32, which truncates, leaves 8e-4 at twice the cost, and
  bfloat16 2.4e-3. Factors of a float32 gradient stay float32, multiplied as three TF32 products.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mofasgd.complement import EPSILONS, NOISE
from mofasgd.kernels import pointers
from mofasgd.kernels.common import matrix_at, stochastic_bfloat16, tile_halves
from mofasgd.kernels.project import sketch_list
from mofasgd.momentum import power_of_two
from mofasgd.precision import in_true_float32

_HALF = 2.0**14
"""Scale of float16 factors: elements in the largest's binade stay below 65504, those 2^-28 of it are still normal."""


class Residual(NamedTuple):
    """R of every matrix: R * inverse = G * inverse - left right' / scale, with scale 1 or, in float16, _HALF^2.

    Attributes:
        left: [Q H], (B, m, 4r), float16 or float32, contiguous.
        right: [T P], (B, n, 4r).
        inverse: (B,) float32, a power of two that brings T and H to size 1.
    """

    left: Tensor
    right: Tensor
    inverse: Tensor


class Tiles(NamedTuple):
    """How a kernel is cut: rows M, columns N, factors' columns R; how many columns a program of `row_scales` has."""

    M: int
    N: int
    R: int
    chunk: int
    warps: int
    stages: int


_TYPES = {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@in_true_float32
def _factors(Q: Tensor, P: Tensor, GP: Tensor, GtQ: Tensor, dtype: torch.dtype) -> Residual:
    """Return the residual of gradients of `dtype`, whose sketches GP and GtQ are by Q and P rounded to it."""
    Qr, Pr = Q.to(dtype).to(Q.dtype), P.to(dtype).to(P.dtype)
    two = 2 * torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
    size = power_of_two(GP, GtQ)
    # (Q'Qr)^-1 = 2 I - Q'Qr up to the square of a rounding; where a column of Q is zero, so is what it multiplies.
    T = (GtQ / size) @ (two - Q.mT @ Qr)
    H = (GP / size - Q @ (T.mT @ Pr)) @ (two - P.mT @ Pr)
    # Sums may be larger than the sketches, and float16 has no room for that.
    unit = (size * power_of_two(T, H)).clamp(min=2.0**-125)
    T, H = T * (size / unit), H * (size / unit)
    left, right = torch.cat([Q, H], dim=-1), torch.cat([T, P], dim=-1)
    if dtype is not torch.float32:
        left, right = (left * _HALF).to(torch.float16), (right * _HALF).to(torch.float16)
    return Residual(left, right, 1 / unit[:, 0, 0])


def residual_factors(gradients: Sequence[Tensor | None], Q: Tensor, P: Tensor) -> Residual:
    """Return what `row_scales` and `apply_complement` need beside the gradients.

    Args:
        gradients: contiguous, of one shape and dtype (float32 or bfloat16), b matrices (m, n) each; None counts as
            zeros.
        Q, P: from `complement.seen_spaces`, (B, m, 2r) and (B, n, 2r), float32, contiguous; B = len(gradients) * b.
    """
    dtype = next(g for g in gradients if g is not None).dtype
    return _factors(Q, P, *sketch_list(gradients, Q, P), dtype)


@triton.jit
def _residual(
    tile, mask, inverse, left, right, rows, columns, m, n, inner: tl.constexpr, product,
    R: tl.constexpr, SCALE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return (G, R) in the residual's unit, a tile each; `product` is a tile of zeros."""
    row, column = (rows < m)[:, None], (columns < n)[None, :]
    if inner <= R:
        # No loop here lets one around it overlap loads with products.
        k = tl.arange(0, R)
        A = tl.load(left + rows[:, None] * inner + k[None, :], mask=row & (k < inner)[None, :], other=0.0)
        B = tl.load(right + columns[None, :] * inner + k[:, None], mask=column & (k < inner)[:, None], other=0.0)
        product = tl.dot(A, B, product, input_precision=PRECISION)
    else:
        for start in range(0, inner, R):
            k = start + tl.arange(0, R)
            A = tl.load(left + rows[:, None] * inner + k[None, :], mask=row & (k < inner)[None, :], other=0.0)
            B = tl.load(right + columns[None, :] * inner + k[:, None], mask=column & (k < inner)[:, None], other=0.0)
            product = tl.dot(A, B, product, input_precision=PRECISION)
    tile = tl.where(mask, tile.to(tl.float32) * inverse, 0.0)
    return tile, tile - product * SCALE


@triton.jit
def _squares(
    gradients, left, right, inverse, squares, m, n, along, across, inner: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, R: tl.constexpr, CHUNK: tl.constexpr, GRADIENT: tl.constexpr,
    ALIGNED: tl.constexpr, WIDE: tl.constexpr, SCALE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Squared lengths of M rows of R and of G in CHUNK columns; G (m, n) has strides (along, across)."""
    batch, part = tl.program_id(2).to(tl.int64), tl.program_id(1)
    rows = tl.program_id(0) * M + tl.arange(0, M)
    G = matrix_at(gradients + batch, GRADIENT, ALIGNED)
    exists = tl.load(gradients + batch) != 0
    scale = tl.load(inverse + batch)

    of_R, of_G = tl.zeros((M,), dtype=tl.float32), tl.zeros((M,), dtype=tl.float32)
    for start in range(0, CHUNK, N):
        columns = part * CHUNK + start + tl.arange(0, N)
        if WIDE:
            inside = rows.to(tl.int64)[:, None] * along + columns.to(tl.int64)[None, :] * across
        else:
            inside = rows[:, None] * along + columns[None, :] * across
        mask = (rows < m)[:, None] & ((columns < n) & exists)[None, :]
        # Read before the products, so that they hide its latency.
        tile = tl.load(G + inside, mask=mask, other=0.0)
        whole, rest = _residual(
            tile, mask, scale, left + batch * m * inner, right + batch * n * inner, rows, columns, m, n, inner,
            tl.zeros((M, N), dtype=tl.float32), R, SCALE, PRECISION,
        )  # fmt: skip
        of_R += tl.sum(rest * rest, axis=1)
        of_G += tl.sum(whole * whole, axis=1)
    result = squares + (batch * tl.num_programs(1) + part) * 2 * m + rows
    tl.store(result, of_R, mask=rows < m)
    tl.store(result + m, of_G, mask=rows < m)


def _arithmetic(residual: Residual) -> tuple[float, str]:
    """Return by what a product of factors is multiplied, and how float32 ones are."""
    # Three products of TF32 parts are as good as one in float32.
    return (_HALF**-2, "tf32") if residual.left.dtype is torch.float16 else (1.0, "tf32x3")


def _block(inner: int, most: int) -> int:
    power: int = triton.next_power_of_2(inner)
    return min(most, max(16, power))


def row_scales(
    gradients: Sequence[Tensor | None], residual: Residual, *, transposed: bool = False, tiles: Tiles | None = None
) -> Tensor:
    """Return a_i = 1 / (|R_i| sqrt(m)), (B, m) float32, in the residual's unit; 0 for a row that is no direction.

    Args:
        gradients: as in `residual_factors`.
        residual: its result.
        transposed: columns take the place of rows; the result is (B, n).
        tiles: for measurements.

    A row is no direction where `complement.normalized_complement` says so. Of a bfloat16 gradient it is none either
    where |R_i| is below NOISE of the terms that were taken away: they may be large and cancel where G_i is zero, as in
    an embedding the row of a token that occurs no more. A matrix that is not finite has zeros.
    """
    left, right, inverse = residual
    batch, m, inner = left.shape
    n = right.shape[1]
    some = next(g for g in gradients if g is not None)
    bfloat16 = some.dtype is torch.bfloat16
    table, aligned = pointers(gradients, batch // len(gradients), m * n * some.element_size(), left.device)
    scale, precision = _arithmetic(residual)
    along, across = n, 1
    if transposed:
        left, right, m, n, along, across = right, left, n, m, across, along
    if bfloat16:
        # All columns of the factors at once, where shared memory has room for them.
        t = tiles or (Tiles(64, 128, 128, 2048, 4, 2) if inner <= 128 else Tiles(64, 64, 256, 2048, 4, 2))
    else:
        t = tiles or Tiles(64, 64, 32, 2048, 4, 2)
    parts = triton.cdiv(n, t.chunk)
    squares = left.new_empty(batch, parts, 2, m, dtype=torch.float32)
    _squares[(triton.cdiv(m, t.M), parts, batch)](
        table, left, right, inverse, squares, m, n, along, across, inner,
        M=t.M, N=t.N, R=_block(inner, t.R), CHUNK=t.chunk, GRADIENT=_TYPES[some.dtype], ALIGNED=aligned,
        WIDE=m * n >= 2**31, SCALE=scale, PRECISION=precision, num_warps=t.warps, num_stages=t.stages,
    )  # fmt: skip
    of_R, of_G = squares.sum(dim=1).unbind(dim=1)
    length, least = of_R.sqrt(), NOISE * of_G.sqrt()
    if bfloat16:
        # Row i of a product rounds by about that share of sqrt(sum_k A_ik^2 |B_k|^2); its terms may cancel.
        of_B = torch.linalg.vector_norm(right, dim=-2, keepdim=True, dtype=torch.float32)
        least = torch.maximum(least, NOISE * scale * torch.linalg.vector_norm(left * of_B, dim=-1))
    floor = EPSILONS * torch.finfo(torch.float32).eps * of_G.mean(dim=-1, keepdim=True).sqrt()
    # An infinite length compares as no larger than its bound.
    return torch.where((length > least) & (length > floor), 1 / (length * math.sqrt(m)), 0.0)


def square_norm(scales: Tensor) -> Tensor:
    """Return |E|_F^2, (B,), from `row_scales`: the share of rows that are a direction."""
    return (scales != 0).to(scales.dtype).mean(dim=-1)


@triton.jit
def _apply(
    weights, gradients, residual_left, residual_right, inverse, scales, left, right, coefficients, keep, keys, steps,
    m, n, rank, slices, inner: tl.constexpr, M: tl.constexpr, N: tl.constexpr, R: tl.constexpr, F: tl.constexpr,
    WEIGHT: tl.constexpr, GRADIENT: tl.constexpr, STOCHASTIC: tl.constexpr, TRANSPOSED: tl.constexpr,
    WEIGHT_ALIGNED: tl.constexpr, GRADIENT_ALIGNED: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr,
    SCALE: tl.constexpr, RESIDUAL_PRECISION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of M x N elements of matrix `batch`; R columns of the residual's factors, F of the others at a time."""
    batch = tl.program_id(1).to(tl.int64)
    across = tl.cdiv(n, N)
    first = (tl.program_id(0) % across) * N
    rows = (tl.program_id(0) // across) * M + tl.arange(0, M)
    columns = first + tl.arange(0, N)
    row, column = rows < m, columns < n

    W = matrix_at(weights + batch, WEIGHT, WEIGHT_ALIGNED)
    G = matrix_at(gradients + batch, GRADIENT, GRADIENT_ALIGNED)
    inside = (rows.to(tl.int64) if WIDE else rows)[:, None] * n + columns[None, :]
    mask = row[:, None] & column[None, :]
    some = mask & (tl.load(gradients + batch) != 0)
    # Read before the products, so that they hide its latency.
    tile = tl.load(G + inside, mask=some, other=0.0)
    value = tl.load(W + inside, mask=mask, other=0.0).to(tl.float32)

    _, rest = _residual(
        tile, some, tl.load(inverse + batch), residual_left + batch * m * inner, residual_right + batch * n * inner,
        rows, columns, m, n, inner, tl.zeros((M, N), dtype=tl.float32), R, SCALE, RESIDUAL_PRECISION,
    )  # fmt: skip
    if TRANSPOSED:
        scale = tl.load(scales + batch * n + columns, mask=column, other=0.0)[None, :]
    else:
        scale = tl.load(scales + batch * m + rows, mask=row, other=0.0)[:, None]
    # What does not move may be infinite or NaN.
    update = tl.where(scale != 0, rest * scale, 0.0)

    for start in range(0, rank, F):
        k = start + tl.arange(0, F)
        c = tl.load(coefficients + batch * rank + k, mask=k < rank, other=0.0)
        L = tl.load(
            left + batch * m * rank + rows[:, None] * rank + k[None, :],
            mask=row[:, None] & (k < rank)[None, :],
            other=0.0,
        )
        T = tl.load(
            right + batch * n * rank + columns[None, :] * rank + k[:, None],
            mask=column[None, :] & (k < rank)[:, None],
            other=0.0,
        )
        update = tl.dot(L * c[None, :], T, update, input_precision=PRECISION)

    value = value * tl.load(keep + batch) - update
    if STOCHASTIC:
        param, before = batch // slices, (batch % slices) * m * n
        halves = tile_halves(keys + 2 * param, tl.load(steps + param), before, rows, first, n, N, EVEN)
        tl.store(W + inside, stochastic_bfloat16(value, halves), mask=mask)
    else:
        tl.store(W + inside, value.to(WEIGHT), mask=mask)


def apply_complement(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    residual: Residual,
    scales: Tensor,
    left: Tensor,
    right: Tensor,
    coefficients: Tensor,
    keep: Tensor,
    keys: Tensor,
    steps: Tensor,
    *,
    stochastic: bool,
    transposed: bool = False,
    tiles: Tiles | None = None,
) -> None:
    """Set W <- keep W - (left diag(coefficients) right' + diag(scales) R) for every matrix, in place, in one launch.

    Args:
        weights: contiguous parameters of one shape and dtype (float32 or bfloat16), b matrices (m, n) each.
        gradients, residual: as in `row_scales`.
        scales: (B, m), of the rows of R in the residual's unit: rate * c sqrt(min(m, n)) * `row_scales`, 0 for a matrix
            that does not move, whose gradient may then be anything.
        left, right: factors (B, m, r), (B, n, r), float32, contiguous; B = len(weights) * b.
        coefficients: (B, r), float32.
        keep: (B,), float32, what decay leaves.
        keys: (len(weights), 2) int32, rows of `rng.key_tensor`.
        steps: (len(weights),), number of the step.
        stochastic: round bfloat16 at random.
        transposed: scale the columns of R, by scales (B, n).
        tiles: for measurements.
    """
    batch, m, rank = left.shape
    n, inner = right.shape[1], residual.left.shape[2]
    slices = batch // len(weights)
    some = next(g for g in gradients if g is not None)
    of_weights, weights_aligned = pointers(weights, slices, m * n * weights[0].element_size(), left.device)
    of_gradients, gradients_aligned = pointers(gradients, slices, m * n * some.element_size(), left.device)
    bfloat16 = weights[0].dtype is torch.bfloat16
    scale, precision = _arithmetic(residual)
    half = some.dtype is torch.bfloat16
    t = tiles or Tiles(64, 128 if half and bfloat16 else 64, 128 if half else 32, 0, 4, 2)
    grid = (triton.cdiv(m, t.M) * triton.cdiv(n, t.N), batch)
    _apply[grid](
        of_weights, of_gradients, residual.left, residual.right, residual.inverse, scales,
        left, right, coefficients, keep, keys, steps, m, n, rank, slices, inner,
        M=t.M, N=t.N, R=_block(inner, t.R), F=_block(rank, 32),
        WEIGHT=_TYPES[weights[0].dtype], GRADIENT=_TYPES[some.dtype], STOCHASTIC=stochastic and bfloat16,
        TRANSPOSED=transposed, WEIGHT_ALIGNED=weights_aligned, GRADIENT_ALIGNED=gradients_aligned,
        EVEN=n % 2 == 0, WIDE=m * n >= 2**31, SCALE=scale, RESIDUAL_PRECISION=precision,
        PRECISION="tf32" if bfloat16 else "tf32x3", num_warps=t.warps, num_stages=t.stages,
    )  # fmt: skip
