"""W <- keep W - L R' for a list of same-shaped weights, in one read and one write of each.

Equals `mofasgd.apply.apply_update` up to the rounding of the product: of L and R to the dtype of W, bfloat16's 8 bits
of a step that is itself a small part of the weight's last place, or to float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mofasgd.kernels import cdiv, pointers
from mofasgd.kernels.common import Tiles, block, matrix_at, operand, precision, stochastic_bfloat16, tile_halves


@triton.jit(do_not_specialize=["offset"])
def _apply(
    weights, left, right, keep, keys, steps, offset, m, n, rank, slices, chunk,
    M: tl.constexpr, N: tl.constexpr, R: tl.constexpr, BLOCKS: tl.constexpr, BFLOAT16: tl.constexpr,
    STOCHASTIC: tl.constexpr, ALIGNED: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """M rows by `chunk` columns of matrix `batch`, N at a time; R columns of the factors at a time."""
    batch = tl.program_id(1).to(tl.int64)
    strips = tl.cdiv(n, chunk)
    rows = (tl.program_id(0) // strips) * M + tl.arange(0, M)
    first = (tl.program_id(0) % strips) * chunk
    row = rows < m
    W = matrix_at(weights + batch, tl.bfloat16 if BFLOAT16 else tl.float32, ALIGNED)
    left += batch * m * rank
    right += batch * n * rank
    kept = tl.load(keep + batch)
    param, before = batch // slices, offset + (batch % slices) * m * n
    step = tl.load(steps + param)

    k = tl.arange(0, R)
    if BLOCKS == 1:
        # A loop that stores does not hoist what it loads itself.
        L = tl.load(left + rows[:, None] * rank + k[None, :], mask=row[:, None] & (k < rank)[None, :], other=0.0)
    # The loop is what lets the next tile be read while this one is multiplied.
    for start in tl.range(first, tl.minimum(first + chunk, n), N, num_stages=STAGES):
        columns = start + tl.arange(0, N)
        column = columns < n
        inside = (rows[:, None].to(tl.int64) if WIDE else rows[:, None]) * n + columns[None, :]
        mask = row[:, None] & column[None, :]
        value = tl.load(W + inside, mask=mask, other=0.0).to(tl.float32) * kept
        if BLOCKS == 1:
            T = tl.load(
                right + k[:, None] * n + columns[None, :], mask=(k < rank)[:, None] & column[None, :], other=0.0
            )
            value -= tl.dot(L.to(DOT), T.to(DOT), input_precision=PRECISION)
        else:
            for block in range(BLOCKS):
                j = block * R + k
                real = j < rank
                A = tl.load(left + rows[:, None] * rank + j[None, :], mask=row[:, None] & real[None, :], other=0.0)
                T = tl.load(right + j[:, None] * n + columns[None, :], mask=real[:, None] & column[None, :], other=0.0)
                value -= tl.dot(A.to(DOT), T.to(DOT), input_precision=PRECISION)
        if STOCHASTIC:
            halves = tile_halves(keys + 2 * param, step, before, rows, start, n, N, EVEN)
            tl.store(W + inside, stochastic_bfloat16(value, halves), mask=mask)
        else:
            tl.store(W + inside, value.to(W.dtype.element_ty), mask=mask)


def _tiles(rank: int, bfloat16: bool) -> Tiles:
    if not bfloat16:
        return Tiles(64, 64, 32, 1024, 4, 2)
    return Tiles(64 if rank <= 128 else 128, 64, 256, 1024, 4 if rank <= 64 else 8, 3)


def turned(right: Tensor, dtype: torch.dtype) -> Tensor:
    """Return V' (B, r, n) of V (B, n, r), contiguous and in `dtype`: its rows are read as they lie in a tile of W."""
    right = right.mT
    if right.dtype is dtype and right.is_contiguous():
        return right
    return torch.empty(right.shape, dtype=dtype, device=right.device).copy_(right)


def apply_factored(
    weights: Sequence[Tensor],
    left: Tensor,
    right: Tensor,
    keep: Tensor,
    keys: Tensor,
    steps: Tensor,
    *,
    stochastic: bool,
    offset: int = 0,
    tiles: Tiles | None = None,
) -> None:
    """Set W <- keep W - left right' for every matrix of `weights`, in place, in one launch.

    Args:
        weights: contiguous parameters of one shape and dtype (float32 or bfloat16), b matrices (m, n) each.
        left: (B, m, r), float32 or the dtype of the weights; B = len(weights) * b.
        right: (B, n, r), float32; not copied if of the weights' dtype and its transpose contiguous.
        keep: (B,), float32, what decay leaves.
        keys: (len(weights), 2) int32, rows of `rng.key_tensor`.
        steps: (len(weights),), number of the step.
        stochastic: round bfloat16 at random.
        offset: elements of the parameter before the first of each weight, which is a part of it; a multiple of n.
        tiles: for measurements.
    """
    batch, m, rank = left.shape
    n = right.shape[1]
    dtype = weights[0].dtype
    bfloat16 = dtype is torch.bfloat16
    slices = batch // len(weights)
    table, aligned = pointers(weights, slices, m * n * weights[0].element_size(), left.device)
    left, right = left.to(dtype).contiguous(), turned(right, dtype)
    t = tiles or _tiles(rank, bfloat16)
    # Long strips, but enough of them for every multiprocessor.
    chunk = t.N * max(1, min(t.chunk // t.N, batch * cdiv(m, t.M) * cdiv(n, t.N) // 2048))
    R = block(rank, t.R)
    grid = (cdiv(m, t.M) * cdiv(n, chunk), batch)
    with torch.cuda.device_of(left):
        _apply[grid](
            table, left, right, keep.contiguous(), keys, steps, offset, m, n, rank, slices, chunk,
            M=t.M, N=t.N, R=R, BLOCKS=cdiv(rank, R), BFLOAT16=bfloat16, STOCHASTIC=stochastic and bfloat16,
            ALIGNED=aligned, EVEN=n % 2 == 0, WIDE=m * n >= 2**31, DOT=operand(dtype), PRECISION=precision(dtype),
            STAGES=t.stages, num_warps=t.warps,
        )  # fmt: skip
    torch.autograd.graph.increment_version(weights)
