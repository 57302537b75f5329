"""Singular vectors of many small matrices at once, by one-sided Jacobi rotations.

Rows of a matrix are rotated in pairs until all are orthogonal: J A = S X' with S diagonal, so that the lengths of the
rows are the singular values and the rows, normalized, the right singular vectors. Equals `torch.linalg.svd` on those
up to order and sign.

Rows are blocked, 16 at a time. A program holds pairs of blocks in registers and turns row i of each against row i ^ d
for d = 1, 2, .., 31: a partner is one shuffle away. Between all rounds in memory the rows would cost its bandwidth: of
a core of 128 x 128 each is read and written 7 times a sweep, not 127.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mofasgd.kernels import cdiv, next_power_of_2

SWEEPS = 15
"""At most. Cores of full rank stop well before; rows of rounding noise in others may stay at any angle."""

TOLERANCE = 1e-4
"""Cosine between rows below which a sweep was the last: the convergence is quadratic, so that it leaves some 1e-8."""

_HELD = 1 << 14
"""Elements of the rows that a program holds: 32 registers of each of 512 threads, and as many for their partners."""


@triton.jit
def _turn(a, distance, Q: tl.constexpr, L: tl.constexpr, C: tl.constexpr):
    """Return rows `a` (Q, L, C), each rotated against that at `distance` (XOR) in L, and the largest cosine of two."""
    row = tl.arange(0, L)[None, :]
    partner = row ^ distance
    b = tl.gather(a, tl.broadcast_to(partner[:, :, None], (Q, L, C)), 1)
    # Partners sum the same products in the same order: they find one angle.
    own, ab = tl.sum(a * a, 2), tl.sum(a * b, 2)
    other = tl.gather(own, tl.broadcast_to(partner, (Q, L)), 1)
    size = tl.sqrt(own) * tl.sqrt(other)
    turned = tl.abs(ab) > 1e-8 * size
    upper = row < partner
    zeta = (tl.where(upper, other, own) - tl.where(upper, own, other)) / (2 * tl.where(turned, ab, 1.0))
    t = tl.where(zeta >= 0, 1.0, -1.0) / (tl.abs(zeta) + tl.sqrt(1 + zeta * zeta))
    t = tl.where(turned, t, 0.0)
    c = 1 / tl.sqrt(1 + t * t)
    s = tl.where(upper, -c * t, c * t)
    largest = tl.max(tl.max(tl.where(turned, tl.abs(ab) / size, 0.0), 1), 0)
    return c[:, :, None] * a + s[:, :, None] * b, largest


@triton.jit
def _jacobi(
    A, rows, columns, blocks,
    Q: tl.constexpr, L: tl.constexpr, C: tl.constexpr, SWEEPS: tl.constexpr, TOLERANCE: tl.constexpr,
):  # fmt: skip
    """Orthogonalize rows of matrix program_id(0) in place: Q pairs at once of an even number of `blocks` of L / 2."""
    HALF: tl.constexpr = L // 2
    A += tl.program_id(0).to(tl.int64) * rows * columns
    row, column = tl.arange(0, L)[None, :], tl.arange(0, C)[None, None, :]
    around = blocks - 1
    sweep, cosine = 0, 1.0
    while (sweep < SWEEPS) & (cosine > TOLERANCE):
        cosine = 0.0
        for turn in range(around):
            for first in range(0, blocks // 2, Q):
                # The last block meets block `turn`; blocks at equal distance from `turn` on the circle meet each other.
                pair = first + tl.arange(0, Q)[:, None]
                one, two = tl.where(pair == 0, around, (turn + pair) % around), (turn - pair + around) % around
                own = tl.where(row < HALF, one * HALF, two * HALF - HALF) + row
                at = A + own[:, :, None] * columns + column
                mask = ((pair < blocks // 2) & (own < rows))[:, :, None] & (column < columns)
                a = tl.load(at, mask=mask, other=0.0)
                # Rows of one block meet in the first turn.
                for distance in range(tl.where(turn == 0, 1, HALF), L):
                    a, largest = _turn(a, distance, Q, L, C)
                    cosine = tl.maximum(cosine, largest)
                tl.store(at, a, mask=mask)
            tl.debug_barrier()
        sweep += 1


def orthogonal_rows(A: Tensor) -> Tensor:
    """Return J A (B, k, c) for a rotation J such that its rows are orthogonal; A is overwritten.

    A is float32, contiguous, of magnitude about 1.
    """
    batch, rows, columns = A.shape
    L, C = min(32, next_power_of_2(rows)), next_power_of_2(columns)
    blocks = 2 * cdiv(rows, L)
    Q = max(1, min(next_power_of_2(blocks // 2), _HELD // (L * C)))
    warps = min(16, max(1, Q * L * C // 1024))
    with torch.cuda.device_of(A):
        _jacobi[(batch,)](
            A, rows, columns, blocks, Q=Q, L=L, C=C, SWEEPS=SWEEPS, TOLERANCE=TOLERANCE, num_warps=warps
        )  # fmt: skip
    return A
