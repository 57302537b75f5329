"""The algebra of many factored momenta at GPU speed: `momentum.update_factors` without QR and large SVDs.

With L = [U GV] (m x 2r) and R = [V GtU] (n x 2r), and C = U'GV,

    beta M + Ghat = L [[beta diag(s) - C, I], [I, 0]] R'.

All that is read of L and R are their Gram matrices L'L and R'R, and all that is done with them are products L W and
R W with small W. Between the two lies algebra of 2r x 2r matrices, one batch for all shapes of equal rank:

1. L = Q T by Gram-Schmidt on L'L that leaves out columns which depend on others (`columns`); R likewise.
2. SVD_r of the core Q'(beta M + Ghat)P: right singular vectors by Jacobi rotations (`kernels.jacobi`), left ones by
   orthonormalizing what the core makes of them.
3. Weights W that carry both back to m and n.

Where so little is left of a column that its Gram matrix has too few digits for it, the new factors are summed once more
and corrected (`polished`). Budget against the exact update, as tests hold it: error at most 1.02 times the best
rank-r error plus 1e-5 |beta M + Ghat|, columns orthonormal to 1e-5. Where momentum and gradient nearly cancel, those
1e-5 are of the larger of the two: float32 holds no more. On CUDA, above rank 32, the core's leading right space comes
from subspace iteration, which may miss the 1.02 where min(m, n) is little above r (1.036 was seen at 64 x 34, r 33);
otherwise nothing is approximate but rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mofasgd.columns import (
    WIDEST,
    again,
    completed,
    independent_columns,
    kept_filling,
    orthonormal,
    pivoted_columns,
    tall_columns,
)
from mofasgd.kernels import usable
from mofasgd.momentum import RANK_TOLERANCE, real_columns

SOLVERS = ("auto", "svd", "gram")
"""Exact QR and SVD; Gram matrices; and the latter where it loses nothing: for factors in float32."""

_LOST = 1e-11
"""`columns.DEPENDENT` for the tall matrices of an update: less of the momentum is lost; factors are polished."""

_CLOSE = 1e-8
"""What is polished: factors of a matrix of whose columns one has less left than this part of its square."""

_DIRECT = {"cpu": 1 << 30, "cuda": 64}
"""Rows of the largest core whose singular vectors are found at once: by LAPACK, by Jacobi rotations."""

_ITERATIONS = 4
"""Applications of the core's fourth power in subspace iteration."""


class Small(NamedTuple):
    """What the update reads of its tall matrices. All float64.

    Attributes:
        grams: Gram matrices [U GV]'[U GV] and [V GtU]'[V GtU], (2, B, 2r, 2r).
        s: singular values of the momentum (B, r), 0 where `real` is.
        real: (B, r), 1 or, for completion columns (`momentum.real_columns`), 0.
        C: U'GV of the real columns (B, r, r).
    """

    grams: Tensor
    s: Tensor
    real: Tensor
    C: Tensor


class Weights(NamedTuple):
    """The result: new U = [U GV] left, new V = [V GtU] right, (B, 2r, r) float64 each, and s (B, r) float64."""

    left: Tensor
    s: Tensor
    right: Tensor


def by_gram(solver: str, left: Tensor, right: Tensor) -> bool:
    """Return whether `solver` (a name of `SOLVERS`) works by Gram matrices on (B, m, .) and (B, n, .)."""
    # Jacobi rotations hold a core in registers: wider ones are for LAPACK's routines.
    wide = left.is_cuda and left.shape[-1] > WIDEST
    return solver == "gram" or (solver == "auto" and left.dtype is torch.float32 and not wide)


def gram(A: Tensor, B: Tensor, out: Tensor) -> None:
    """Put [A B]' [A B] into `out`, float64 (B, 2r, 2r), of float32 or float64 (B, m, r) each."""
    if usable(A.device) and A.dtype is torch.float32:
        from mofasgd.kernels.gram import gram as on_gpu

        on_gpu(A, B, out)
        return
    L = torch.cat([A, B], dim=-1).double()
    torch.matmul(L.mT, L, out=out)


def combine(A: Tensor, B: Tensor, weights: Tensor, active: Tensor) -> Tensor:
    """Return [A B] weights (B, m, r) in the dtype of A, summed in float64; undefined where not `active` (B,)."""
    if usable(A.device) and A.dtype is torch.float32:
        from mofasgd.kernels.gram import combine as on_gpu

        return on_gpu(A, B, weights, active)
    return (torch.cat([A, B], dim=-1).double() @ weights).to(A.dtype)


def polished(tall: Sequence[tuple[Tensor, Tensor]], weights: Tensor, closest: Tensor) -> Tensor:
    """Return weights whose [A B] weights are orthonormal, of those that make them nearly so: by Newton's method.

    What is summed anew for it, the product's own Gram matrix, does not have the error of [A B]'[A B] in small columns.
    Elsewhere nothing is read and nothing changes.

    Args:
        tall: A and B (b, m, r), float32 or float64, of one shape after the other.
        weights: (B, 2r, r) float64, of all shapes.
        closest: (B,), from `tall_columns`.
    """
    close = closest < _CLOSE
    if _idle(close):
        return weights
    excess = weights.new_zeros(len(weights), weights.shape[-1], weights.shape[-1])
    end = 0
    for A, B in tall:
        part = slice(end, end := end + len(A))
        if not _idle(close[part]):
            _excess(A, B, weights[part], close[part], excess[part])
    # The inverse square root of I + excess, up to its cube.
    return torch.baddbmm(weights, weights, torch.baddbmm(excess, excess, excess, alpha=-0.75), alpha=-0.5)


def _idle(close: Tensor) -> bool:
    """Return whether none is close, where the host can see it."""
    return close.device.type == "cpu" and not close.any()


def _excess(A: Tensor, B: Tensor, weights: Tensor, close: Tensor, out: Tensor) -> None:
    """Put Q'Q - I of Q = [A B] weights into `out` (b, r, r) where `close` (b,)."""
    if usable(A.device) and A.dtype is torch.float32:
        from mofasgd.kernels.gram import excess as on_gpu

        on_gpu(A, B, weights, close, out)
        return
    Q = torch.cat([A, B], dim=-1).double() @ weights
    found = Q.mT @ Q
    found.diagonal(dim1=-2, dim2=-1).sub_(1)
    out.copy_(torch.where(close[:, None, None], found, 0.0))


def _right_vectors(core: Tensor, rank: int) -> Tensor:
    """Return the leading right singular vectors (B, k, rank) of core (B, k, k), in falling order, or zeros."""
    if core.shape[-1] > _DIRECT.get(core.device.type, 1 << 30) and rank < core.shape[-1]:
        Y = _leading_space(core, rank)
        # core Y = X B, and the singular vectors of the rank x rank matrix B turn Y
        image = core @ Y
        B, _ = independent_columns(image.mT @ image, twice=False)
        return Y @ _right_vectors(B, rank)
    if not usable(core.device):
        rows: Tensor
        _, s, rows = torch.linalg.svd(core)
        # Vectors of the null space may lie in coordinates that stand for no column.
        real = s[:, :rank] > 1e-13 * s[:, :1]
        found: Tensor = rows[:, :rank].mT * real[:, None, :]
        return found
    from mofasgd.kernels.jacobi import orthogonal_rows

    rows = orthogonal_rows(core.to(torch.float32, copy=True, memory_format=torch.contiguous_format))
    lengths, order = torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float64).topk(rank, dim=-1)
    rows = rows.gather(1, order[:, :, None].expand(-1, -1, rows.shape[-1]))
    # What is left of the null space is no direction; completions take its place.
    scale = torch.where(lengths > 1e-12 * lengths[:, :1], lengths.reciprocal(), 0.0)
    return (rows * scale[:, :, None]).mT


def _leading_space(core: Tensor, rank: int) -> Tensor:
    """Return an orthonormal basis (B, k, rank) of nearly the leading right singular space, by subspace iteration."""
    H = core.mT @ core
    fourth = H @ H
    Y = kept_filling(core.shape[-1], core.shape[-1], rank, core.device)
    # The power grows by a factor of two at most from one product to the next: otherwise what rounding leaves of the
    # large directions would swamp the small ones.
    for power in (core, core.mT, H, *[fourth] * (_ITERATIONS - 1)):
        Y = orthonormal(power @ Y, twice=False)[0]
    # It does where they are far smaller: those columns begin anew, clear of the large directions, which are known now.
    return orthonormal(fourth @ completed(Y, core.shape[-1]), twice=False)[0]


def observed(grams: Tensor, s: Tensor) -> tuple[Small, Tensor, Tensor, Tensor]:
    """Return what the update needs, whether sketches are finite, which are not zero either, and |Ghat|^2 of these.

    Flags are (B,), squared norms (B,) float64, 0 where the sketch is not finite.

    Args:
        grams: as in `Small`, of all stored columns; anything where a sketch is not finite. Not to be used any more.
        s: stored singular values (B, r).
    """
    if usable(grams.device) and s.dtype is torch.float32:
        from mofasgd.kernels.small import observed as on_gpu

        small, finite, moves, norms = on_gpu(grams, s, RANK_TOLERANCE)
        return Small(grams, *small), finite, moves, norms
    r = s.shape[-1]
    # A column that is not finite shows in its square; a sum of float32 squares stays in float64's range.
    squares = grams.diagonal(dim1=-2, dim2=-1).sum(dim=0)
    finite = squares.sum(dim=-1) < math.inf
    grams = torch.where(finite[:, None, None], grams, 0.0)
    real = real_columns(s).double()
    C = grams[0, :, :r, r:] * real[:, :, None] * real[:, None, :]
    total = (squares[:, r:] * real).sum(dim=-1)
    norms = (total - C.square().sum(dim=(-2, -1))).clamp(min=0)
    finite = finite & (norms < math.inf)
    moves = finite & (total > 0)
    return Small(grams, s * real, real, C), finite, moves, torch.where(moves, norms, 0.0)


def solve(small: Small, beta: float | Tensor, factor: Tensor | None) -> tuple[Weights, Tensor]:
    """Return the weights that update the factors, before they are polished, and (2B,) how close it was.

    Args:
        small: of stored factors; completion columns do not enter the tangent space.
        beta: momentum decay.
        factor: of the gradient, 0-dim float64, or None for 1.
    """
    r = small.s.shape[-1]
    # A second time would not mend the rounding of the Gram matrices themselves.
    T, N, closest = tall_columns(small.grams.flatten(0, 1), _LOST)
    (Tu, Tv), (Nu, Nv) = T.chunk(2), N.chunk(2)

    # Q'(beta M + Ghat)P = Tu [[beta diag(s) - f C, f real], [f real, 0]] Tv'
    decayed, f = beta * small.s, small.real if factor is None else small.real * factor
    A = Tu[:, :, :r] * f[:, None, :]
    B = torch.addcmul(Tu[:, :, :r] * decayed[:, None, :], Tu[:, :, r:], f[:, None, :])
    B = torch.baddbmm(B, A, small.C, alpha=-1)
    core = torch.baddbmm(B @ Tv[:, :, :r].mT, A, Tv[:, :, r:].mT)
    size = torch.linalg.vector_norm(core, torch.inf, dim=(-2, -1), keepdim=True).clamp(min=1e-300)
    core = core / size

    # Completions lie in the coordinates of U and V, which are always there.
    Y = completed(_right_vectors(core, r), r)
    X, _, R = orthonormal(core @ Y, twice=False)
    found = R.diagonal(dim1=-2, dim2=-1).cummin(dim=-1).values * size[:, :, 0]
    # Where momentum and gradient cancel, what is left of them in float32 is no direction.
    sketched = small.grams.diagonal(dim1=-2, dim2=-1)[:, :, r:].amax(dim=0).sqrt()
    terms = torch.maximum(f * sketched, decayed).amax(dim=-1, keepdim=True)
    # A factorization that failed stays visible as NaN.
    found = torch.where(found <= torch.finfo(torch.float32).eps * terms, 0.0, found)
    return Weights(Nu @ completed(X, r), found, Nv @ Y), closest


def extended(A: Tensor, B: Tensor, weights: Tensor, kept: Tensor) -> Tensor:
    """Return [A diag(kept), [A B] weights] (B, m, 2r) in the dtype of A, the second half summed in float64."""
    if usable(A.device) and A.dtype is torch.float32:
        from mofasgd.kernels.factors import extend

        return extend(A, B, weights, kept)
    return torch.cat([A * kept[:, None, :].to(A.dtype), (torch.cat([A, B], dim=-1).double() @ weights).to(A.dtype)], -1)


def seen_columns(small: Small) -> tuple[Tensor, Tensor]:
    """Return how long (2, B, r) what GV adds to U is, and GtU to V, and the weights (2, B, 2r, r) of its unit columns.

    All float64. `small` is of stored factors; completion columns take no part.
    """
    r = small.s.shape[-1]
    real = small.real.repeat(1, 2)
    grams = (small.grams * real[:, :, None] * real[:, None, :]).flatten(0, 1)
    R, N = again(grams, *tall_columns(grams)[:2])
    return R.diagonal(dim1=-2, dim2=-1)[:, r:].view(2, -1, r), N.view(2, -1, 2 * r, 2 * r)[..., r:]


def seen(lengths: Tensor, weights: Tensor, sizes: Tensor) -> Tensor:
    """Return `weights` of `seen_columns` with zeros for columns that are rounding; `sizes` (B,) are |G|_F, float64."""
    # A sum in float64, of bfloat16 or float32 products: what is left of a column inside the space is rounding.
    noise = 100 * torch.finfo(torch.float32).eps * sizes[:, None]
    return weights * (lengths > noise)[:, :, None, :]


def start(YY: Tensor, ZZ: Tensor, PY: Tensor, rank: int) -> Weights:
    """Return weights (P, l, r) and (P, k, r) that make U of Y and V of Z, and s: `momentum.init_factors`.

    Columns beyond the rank of G are zeros. All float64.

    Args:
        YY, ZZ: Gram matrices Y'Y (P, l, l) and Z'Z (P, k, k) of the first window's sketches; finite.
        PY: Psi'Y (P, k, l).
    """
    _, N = again(YY, *pivoted_columns(YY, YY.diagonal(dim1=-2, dim2=-1))[:2])
    # Q = Y N;  G ~ Q X  with  X = (Psi'Q)^+ Z',  X' = Z F
    B, NB, _ = orthonormal(PY @ N)
    F = B @ NB.mT
    # X' = P R with P = Z F N2, so that G ~ Q R' P'
    R, N2 = independent_columns(F.mT @ ZZ @ F)
    core = R.mT
    size = core.abs().amax(dim=(-2, -1), keepdim=True)
    size = torch.where(size > 0, size, 1.0)
    right = orthonormal(_right_vectors(core / size, rank))[0]
    left, _, T = orthonormal(core / size @ right)
    found = T.diagonal(dim1=-2, dim2=-1).cummin(dim=-1).values * size[:, :, 0]
    return Weights(N @ left, found, F @ N2 @ right)
