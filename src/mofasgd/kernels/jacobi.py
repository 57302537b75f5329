"""Singular vectors of many small matrices at once, by one-sided Jacobi rotations.

Rows of a matrix are rotated in pairs until all are orthogonal: J A = S X' with S diagonal, so that the lengths of the
rows are the singular values and the rows, normalized, the right singular vectors. Equals `torch.linalg.svd` on those
up to order and sign.

A program holds two blocks of rows in registers and turns row i against row i ^ d for d = 1, 2, ..: all pairs of a
round at once, each row by its own thread's sums. Rows between rounds in memory would cost their bandwidth: a core of
128 x 128 is read and written 127 times a sweep.
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

_HELD = 1 << 14
"""Elements of the rows that a program holds: 32 registers a thread of 512, and as many for their partners."""


@triton.jit
def _turn(a, distance, P: tl.constexpr, C: tl.constexpr):
    """Return rows `a` (P, C), each rotated against that at `distance` (XOR), and the largest cosine between two."""
    row = tl.arange(0, P)
    partner = row ^ distance
    b = tl.gather(a, tl.broadcast_to(partner[:, None], (P, C)), 0)
    # Partners sum the same products in the same order: they find one angle.
    own, ab = tl.sum(a * a, 1), tl.sum(a * b, 1)
    other = tl.gather(own, partner, 0)
    size = tl.sqrt(own) * tl.sqrt(other)
    turned = tl.abs(ab) > 1e-8 * size
    upper = row < partner
    zeta = (tl.where(upper, other, own) - tl.where(upper, own, other)) / (2 * tl.where(turned, ab, 1.0))
    t = tl.where(zeta >= 0, 1.0, -1.0) / (tl.abs(zeta) + tl.sqrt(1 + zeta * zeta))
    t = tl.where(turned, t, 0.0)
    c = 1 / tl.sqrt(1 + t * t)
    s = tl.where(upper, -c * t, c * t)
    return c[:, None] * a + s[:, None] * b, tl.max(tl.where(turned, tl.abs(ab) / size, 0.0))


@triton.jit
def _jacobi(
    A, rows, columns, blocks, HALF: tl.constexpr, C: tl.constexpr, SWEEPS: tl.constexpr, TOLERANCE: tl.constexpr
):
    """Orthogonalize the rows of matrix program_id(0), in place, in an even number of `blocks` of HALF rows."""
    A += tl.program_id(0).to(tl.int64) * rows * columns
    row, column = tl.arange(0, 2 * HALF), tl.arange(0, C)
    around = blocks - 1
    sweep, cosine = 0, 1.0
    while (sweep < SWEEPS) & (cosine > TOLERANCE):
        cosine = 0.0
        for turn in range(around):
            # The last block meets block `turn`; blocks at equal distance from `turn` on the circle meet each other.
            for pair in range(blocks // 2):
                one, two = tl.where(pair == 0, around, (turn + pair) % around), (turn - pair + around) % around
                own = tl.where(row < HALF, one * HALF, two * HALF - HALF) + row
                at = A + own[:, None] * columns + column[None, :]
                mask = (own < rows)[:, None] & (column < columns)[None, :]
                a = tl.load(at, mask=mask, other=0.0)
                # Rows of one block meet in the first round.
                for distance in range(tl.where(turn == 0, 1, HALF), 2 * HALF):
                    a, largest = _turn(a, distance, 2 * HALF, C)
                    cosine = tl.maximum(cosine, largest)
                tl.store(at, a, mask=mask)
            tl.debug_barrier()
        sweep += 1


def orthogonal_rows(A: Tensor) -> Tensor:
    """Return J A (B, k, c) for a rotation J such that its rows are orthogonal; A is overwritten.

    A is float32, contiguous, of magnitude about 1.
    """
    batch, rows, columns = A.shape
    C = triton.next_power_of_2(columns)
    HALF = min(triton.next_power_of_2(rows), max(2, _HELD // C)) // 2
    blocks = 2 * triton.cdiv(rows, 2 * HALF)
    warps = min(16, max(1, 2 * HALF * C // 1024))
    with torch.cuda.device_of(A):
        _jacobi[(batch,)](
            A, rows, columns, blocks, HALF=HALF, C=C, SWEEPS=SWEEPS, TOLERANCE=TOLERANCE, num_warps=warps
        )  # fmt: skip
    return A
