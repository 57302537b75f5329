"""What the update reads of its Gram matrices, in one launch. `observed` equals `mofasgd.algebra.observed`.

A GPU is done with each of those twenty operators on small tensors before Python comes with the next one. Only sums
round otherwise, in float64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mofasgd.kernels import next_power_of_2

_TILE = 1 << 11
"""Elements of a Gram matrix that a program holds at a time."""


@triton.jit
def _observe(
    grams, stored, s, real, C, finite, moves, norms, batch, r,
    TOLERANCE: tl.constexpr, T: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """`observed` of matrix program_id(0), T rows of r <= K columns at a time."""
    matrix, width = tl.program_id(0).to(tl.int64), 2 * r
    left, right = grams + matrix * width * width, grams + (batch + matrix) * width * width
    k = tl.arange(0, K)
    inside, own = k < r, matrix * r + k
    value, largest = tl.load(stored + own, mask=inside, other=0.0), tl.load(stored + matrix * r)
    # As `momentum.real_columns`: of a momentum of 0 all columns are.
    bound = tl.where(largest == 0, -1.0, largest * TOLERANCE)
    kept = tl.where(inside & (value > bound), 1.0, 0.0).to(tl.float64)
    tl.store(real + own, kept, mask=inside)
    tl.store(s + own, value * kept, mask=inside)

    # A column that is not finite shows in its square; a sum of float32 squares stays in float64's range.
    at = k * (width + 1)
    of_stored = tl.load(left + at, mask=inside, other=0.0) + tl.load(right + at, mask=inside, other=0.0)
    at += r * (width + 1)
    of_sketch = tl.load(left + at, mask=inside, other=0.0) + tl.load(right + at, mask=inside, other=0.0)
    whole = tl.sum(of_stored + of_sketch, 0) < float("inf")
    total = tl.sum(of_sketch * kept, 0)

    square = tl.zeros((K,), dtype=tl.float64)
    for start in range(0, r, T):
        row = start + tl.arange(0, T)
        mask = (row < r)[:, None] & inside[None, :]
        product = tl.load(left + row[:, None] * width + r + k[None, :], mask=mask, other=0.0)
        rows = tl.where(tl.load(stored + matrix * r + row, mask=row < r, other=0.0) > bound, 1.0, 0.0).to(tl.float64)
        product = tl.where(whole, product, 0.0) * rows[:, None] * kept[None, :]
        tl.store(C + matrix * r * r + row[:, None] * r + k[None, :], product, mask=mask)
        square += tl.sum(product * product, 0)
    norm = total - tl.sum(square, 0)
    norm = tl.where(norm < 0, 0.0, norm)
    fits = whole & (norm < float("inf"))
    tl.store(finite + matrix, fits.to(tl.uint8))
    moving = fits & (total > 0)
    tl.store(moves + matrix, moving.to(tl.uint8))
    tl.store(norms + matrix, tl.where(moving, norm, 0.0))
    # None of it where they are finite.
    for start in range(0, tl.where(whole, 0, width * width), T * K):
        element = start + tl.arange(0, T * K)
        tl.store(left + element, tl.zeros((T * K,), dtype=tl.float64), mask=element < width * width)
        tl.store(right + element, tl.zeros((T * K,), dtype=tl.float64), mask=element < width * width)


def observed(
    grams: Tensor, s: Tensor, tolerance: float
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, Tensor, Tensor]:
    """Return s, real and C of `algebra.Small`, and what `algebra.observed` returns beside it.

    Args:
        grams: (2, B, 2r, 2r) float64, contiguous; zeros are put where a sketch is not finite.
        s: (B, r) float32, contiguous.
        tolerance: `momentum.RANK_TOLERANCE`.
    """
    batch, r = s.shape
    real, kept = grams.new_empty(2, batch, r).unbind()
    C, norms = grams.new_empty(batch, r, r), grams.new_empty(batch)
    finite, moves = torch.empty(2, batch, dtype=torch.uint8, device=s.device).unbind()
    K = max(16, next_power_of_2(r))
    with torch.cuda.device_of(grams):
        _observe[(batch,)](
            grams, s, kept, real, C, finite, moves, norms, batch, r,
            TOLERANCE=tolerance, T=max(2, _TILE // K), K=K, num_warps=4,
        )  # fmt: skip
    return (kept, real, C), finite.view(torch.bool), moves.view(torch.bool), norms
