"""Singular vectors of many small matrices at once, by one-sided Jacobi rotations.

Rows of a matrix are rotated in pairs until all are orthogonal: J A = S X' with S diagonal, so that the lengths of the
rows are the singular values and the rows, normalized, the right singular vectors. Equals `torch.linalg.svd` on those
up to order and sign. Round-robin pairing lets one program rotate all pairs of a round at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

SWEEPS = 15
"""At most. Cores of full rank stop well before; rows of rounding noise in others may stay at any angle."""

TOLERANCE = 1e-4
"""Cosine between rows below which a sweep was the last: the convergence is quadratic, so that it leaves some 1e-8."""


@triton.jit
def _jacobi(A, rows, columns, HALF: tl.constexpr, C: tl.constexpr, SWEEPS: tl.constexpr, TOLERANCE: tl.constexpr):
    """Orthogonalize the rows (an even number) of matrix program_id(0), in place."""
    A += tl.program_id(0).to(tl.int64) * rows * columns
    pair, column = tl.arange(0, HALF), tl.arange(0, C)
    mask = (pair < rows // 2)[:, None] & (column < columns)[None, :]
    around = rows - 1
    sweep, cosine = 0, 1.0
    while (sweep < SWEEPS) & (cosine > TOLERANCE):
        cosine = 0.0
        for turn in range(around):
            # The last row meets row `turn`, and rows at equal distance from `turn` on the circle meet each other.
            one = tl.where(pair == 0, around, (turn + pair) % around)
            two = (turn - pair + around) % around
            at, bt = A + one[:, None] * columns + column[None, :], A + two[:, None] * columns + column[None, :]
            a, b = tl.load(at, mask=mask, other=0.0), tl.load(bt, mask=mask, other=0.0)
            aa, bb, ab = tl.sum(a * a, 1), tl.sum(b * b, 1), tl.sum(a * b, 1)
            size = tl.sqrt(aa) * tl.sqrt(bb)
            turned = tl.abs(ab) > 1e-8 * size
            cosine = tl.maximum(cosine, tl.max(tl.where(turned, tl.abs(ab) / size, 0.0)))
            zeta = (bb - aa) / (2 * tl.where(turned, ab, 1.0))
            t = tl.where(zeta >= 0, 1.0, -1.0) / (tl.abs(zeta) + tl.sqrt(1 + zeta * zeta))
            t = tl.where(turned, t, 0.0)
            c = 1 / tl.sqrt(1 + t * t)
            s = c * t
            tl.debug_barrier()
            tl.store(at, c[:, None] * a - s[:, None] * b, mask=mask)
            tl.store(bt, s[:, None] * a + c[:, None] * b, mask=mask)
            tl.debug_barrier()
        sweep += 1


def orthogonal_rows(A: Tensor) -> Tensor:
    """Return J A (B, k, c) for a rotation J such that its rows are orthogonal; A is overwritten.

    A is float32, contiguous, of magnitude about 1.
    """
    batch, rows, columns = A.shape
    if rows % 2:
        A = torch.cat([A, A.new_zeros(batch, 1, columns)], dim=1)
    HALF, C = triton.next_power_of_2(A.shape[1] // 2), triton.next_power_of_2(columns)
    warps = min(16, max(1, HALF * C // 512))
    with torch.cuda.device_of(A):
        _jacobi[(batch,)](
            A, A.shape[1], columns, HALF=HALF, C=C, SWEEPS=SWEEPS, TOLERANCE=TOLERANCE, num_warps=warps
        )  # fmt: skip
    return A
