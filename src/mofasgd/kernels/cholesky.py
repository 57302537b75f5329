"""Cholesky factors of many small Gram matrices that may be singular; equals `mofasgd.algebra.independent_columns`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGEST = 64
"""Rows and columns that one program holds in registers."""


@triton.jit
def _factor(gram, upper, inverse, size, tolerance, K: tl.constexpr):
    batch = tl.program_id(0).to(tl.int64)
    i, j = tl.arange(0, K)[:, None], tl.arange(0, K)[None, :]
    mask = (i < size) & (j < size)
    at = batch * size * size + i * size + j
    S = tl.load(gram + at, mask=mask, other=0.0)
    R = tl.zeros((K, K), dtype=tl.float64)
    N = tl.where(i == j, 1.0, 0.0).to(tl.float64)
    for step in range(size):
        row = tl.sum(tl.where(i == step, S, 0.0), axis=0)
        pivot = tl.sum(tl.where(tl.arange(0, K) == step, row, 0.0), axis=0)
        # What is left of a column that depends on those before it is rounding noise.
        scale = tl.where(pivot > tolerance, 1 / tl.sqrt(tl.where(pivot > tolerance, pivot, 1.0)), 0.0)
        row = tl.where(tl.arange(0, K) >= step, row * scale, 0.0)
        n = tl.sum(tl.where(j == step, N, 0.0), axis=1) * scale
        R = tl.where(i == step, row[None, :], R)
        S -= row[:, None] * row[None, :]
        N = tl.where(j == step, n[:, None], N - tl.where(j > step, n[:, None] * row[None, :], 0.0))
    tl.store(upper + at, R, mask=mask)
    tl.store(inverse + at, N, mask=mask)


def independent_columns(gram: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """See `mofasgd.algebra.independent_columns`; gram (B, k, k) float64, k <= LARGEST."""
    gram = gram.contiguous()
    upper, inverse = torch.empty_like(gram), torch.empty_like(gram)
    K = max(16, triton.next_power_of_2(gram.shape[-1]))
    _factor[(len(gram),)](gram, upper, inverse, gram.shape[-1], tolerance, K=K, num_warps=4)
    return upper, inverse
