"""W <- keep W - (L diag(c) R') for a list of same-shaped weights, in one read and one write of each.

Equals `mofasgd.apply.apply_update` up to the rounding of the product: to float32 for float32 weights, to TF32's
10 bits for bfloat16 ones, where stochastic rounding adds a noise that is far larger.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mofasgd.kernels import pointers
from mofasgd.kernels.common import matrix_at, random_words, stochastic_bfloat16


@triton.jit
def _apply(
    weights, left, right, coefficients, keep, keys, steps, m, n, rank, slices,
    M: tl.constexpr, N: tl.constexpr, R: tl.constexpr, BFLOAT16: tl.constexpr, STOCHASTIC: tl.constexpr,
    ALIGNED: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of M x N elements of matrix `batch`; R columns of the factors at a time."""
    batch = tl.program_id(1).to(tl.int64)
    across = tl.cdiv(n, N)
    rows = (tl.program_id(0) // across) * M + tl.arange(0, M)
    columns = (tl.program_id(0) % across) * N + tl.arange(0, N)
    row, column = rows < m, columns < n

    W = matrix_at(weights + batch, tl.bfloat16 if BFLOAT16 else tl.float32, ALIGNED)
    inside = (rows[:, None].to(tl.int64) if WIDE else rows[:, None]) * n + columns[None, :]
    mask = row[:, None] & column[None, :]
    # Read before the products, so that they hide its latency.
    value = tl.load(W + inside, mask=mask, other=0.0).to(tl.float32)

    update = tl.zeros((M, N), dtype=tl.float32)
    for start in range(0, rank, R):
        k = start + tl.arange(0, R)
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
        step = tl.load(steps + param)
        if EVEN:
            # Neighbours share a word, and a word takes longer than the rest of the element.
            pairs = (tl.program_id(0) % across) * (N // 2) + tl.arange(0, N // 2)
            number = (before // 2).to(tl.int32) + rows[:, None] * (n // 2) + pairs[None, :]
            words = random_words(keys + 2 * param, step, number)
            halves = tl.interleave(words & 0xFFFF, words >> 16)
        else:
            element = before + rows[:, None].to(tl.int64) * n + columns[None, :]
            words = random_words(keys + 2 * param, step, (element >> 1).to(tl.int32))
            halves = tl.where((element & 1) == 0, words & 0xFFFF, words >> 16)
        tl.store(W + inside, stochastic_bfloat16(value, halves), mask=mask)
    else:
        tl.store(W + inside, value.to(W.dtype.element_ty), mask=mask)


def apply_factored(
    weights: Sequence[Tensor],
    left: Tensor,
    right: Tensor,
    coefficients: Tensor,
    keep: Tensor,
    keys: Tensor,
    steps: Tensor,
    *,
    stochastic: bool,
) -> None:
    """Set W <- keep W - left diag(coefficients) right' for every matrix of `weights`, in place, in one launch.

    Args:
        weights: contiguous parameters of one shape and dtype (float32 or bfloat16), b matrices (m, n) each.
        left, right: factors (B, m, r), (B, n, r), float32, contiguous; B = len(weights) * b.
        coefficients: (B, r), float32.
        keep: (B,), float32, what decay leaves.
        keys: (len(weights), 2) int32, rows of `rng.key_tensor`.
        steps: (len(weights),), number of the step.
        stochastic: round bfloat16 at random.
    """
    batch, m, rank = left.shape
    n = right.shape[1]
    slices = batch // len(weights)
    bfloat16 = weights[0].dtype is torch.bfloat16
    table, aligned = pointers(weights, slices, m * n * weights[0].element_size(), left.device)
    M, N, warps = (64, 128, 4) if rank <= 64 else (128, 128, 8)
    R = min(32, max(16, triton.next_power_of_2(rank)))
    grid = (triton.cdiv(m, M) * triton.cdiv(n, N), batch)
    _apply[grid](
        table, left, right, coefficients, keep, keys, steps, m, n, rank, slices,
        M=M, N=N, R=R, BFLOAT16=bfloat16, STOCHASTIC=stochastic and bfloat16,
        ALIGNED=aligned, EVEN=n % 2 == 0, WIDE=m * n >= 2**31, PRECISION="tf32" if bfloat16 else "tf32x3",
        num_warps=warps,
    )  # fmt: skip
