"""The algebra of many factored momenta at GPU speed: `momentum.update_factors` without QR and large SVDs.

With L = [U GV] (m x 2r) and R = [V GtU] (n x 2r), and C = U'GV,

    beta M + Ghat = L [[beta diag(s) - C, I], [I, 0]] R'.

All that is read of L and R are their Gram matrices L'L and R'R, and all that is done with them are products L W and
R W with small W. Between the two lies algebra of 2r x 2r matrices, one batch for all shapes of equal rank:

1. L = Q T by Gram-Schmidt on L'L that leaves out columns which depend on others; R likewise.
2. SVD_r of the core Q'(beta M + Ghat)P: right singular vectors by Jacobi rotations (`kernels.jacobi`), left ones by
   orthonormalizing what the core makes of them.
3. Weights W that carry both back to m and n.

Gram matrices square what they are made of, so they are summed and factorized in float64, where half the digits are
still more than float32 has; where so little is left of a column that they are not, the new factors are summed once more
and corrected (`polished`). Budget against the exact update, as tests hold it: error at most 1.02 times the best
rank-r error plus 1e-5 |beta M + Ghat|, columns orthonormal to 1e-5. On CUDA, above rank 32, the core's leading
right space comes from subspace iteration; otherwise nothing is approximate but rounding.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mofasgd.kernels import usable
from mofasgd.momentum import RANK_TOLERANCE, real_columns
from mofasgd.rng import gaussian

SOLVERS = ("auto", "svd", "gram")
"""Exact QR and SVD; Gram matrices; and the latter where it loses nothing: for factors in float32."""

DEPENDENT = 8e-11
"""A column whose squared distance from those before it is below this part of its square depends on them.

Products in float64 leave an error of some 1e-15 in that square, hence 1e-5 in the length of what is kept."""

_LOST = 1e-11
"""`DEPENDENT` for the tall matrices of an update: less of the momentum is lost, and the factors are polished."""

_CLOSE = 1e-8
"""What is polished: factors of a matrix of whose columns one has less left than this part of its square."""

SHARE = 0.5
"""Of the most that is left of any column: what must be left of the next one."""

_WIDEST = 1024
"""Columns of what is still worked on by Gram matrices on a GPU: factors, or the first window's sketches."""

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
    wide = left.is_cuda and left.shape[-1] > _WIDEST
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


def independent_columns(gram: Tensor, *, twice: bool = True) -> tuple[Tensor, Tensor]:
    """Return R and N (B, k, k) for A with the Gram matrix A'A: A = (A N) R. Float64.

    A N has orthonormal columns, and zeros where a column of A depends on the others (`DEPENDENT`); R has zero rows
    there. A GPU takes the columns in order: see `pivoted_columns` for when that is not enough.

    Args:
        gram: A'A.
        twice: orthogonalize once more what has come of it. Otherwise A N is as orthonormal as A'A has digits left for
            it: to some 1e-5 where columns of A nearly depend on each other.
    """
    if usable(gram.device):
        from mofasgd.kernels.columns import independent_columns as on_gpu

        return on_gpu(gram, DEPENDENT, twice)
    R, N, _ = pivoted_columns(gram, gram.diagonal(dim1=-2, dim2=-1))
    return _again(gram, R, N) if twice else (R, N)


def pivoted_columns(gram: Tensor, squares: Tensor, least: float = DEPENDENT) -> tuple[Tensor, Tensor, Tensor]:
    """Return R and N as `independent_columns` does once, with columns of which little is left put off; and how little.

    The next column is the first of which at least `SHARE` of the most that is left of any is left, both as parts of
    their `squares`. In order, what rounding leaves of a column may become a direction, of which later columns that
    really have it are cleared; and what is left of these is more rounding than `least` allows for.

    Args:
        gram: (B, k, k), of columns, or of what others have left of them.
        squares: (B, k), of the whole columns.
        least: what takes the place of `DEPENDENT`.

    Returns:
        R, N (B, k, k), and the smallest part of its square that is left of a column that is kept, (B,), 1 at most.
    """
    if usable(gram.device):
        from mofasgd.kernels.columns import pivoted_columns as on_gpu

        return on_gpu(gram, squares, least, SHARE)
    lengths = torch.where(squares > 0, squares, 1.0).sqrt()
    unit = gram / (lengths[:, :, None] * lengths[:, None, :])
    R, N = (_in_order if unit.device.type == "cpu" else _by_pivots)(unit, least)
    pivots = R.diagonal(dim1=-2, dim2=-1).square()
    closest = torch.where(pivots > 0, pivots, 1.0).amin(dim=-1)
    return R * lengths[:, None, :], N / lengths[:, :, None], closest


def _in_order(A: Tensor, least: float) -> tuple[Tensor, Tensor]:
    """`_by_pivots` by LAPACK where the order is the given one, as it is most of the time; it reads whether it is."""
    R, failed = torch.linalg.cholesky_ex(A, upper=True)
    N = torch.linalg.solve_triangular(R, torch.eye(R.shape[-1], dtype=R.dtype).expand_as(R), upper=True)
    # What is left of column k when it is the turn of column j: sum of R_ik^2 over i >= j.
    most = R.square().flip(-2).cumsum(dim=-2).flip(-2).amax(dim=-1)
    pivots = R.diagonal(dim1=-2, dim2=-1).square()
    other = ~((pivots >= SHARE * most) & (pivots > least)).all(dim=-1) | (failed != 0)
    if other.any():
        R[other], N[other] = _by_pivots(A[other], least)
    return R, N


def _by_pivots(A: Tensor, least: float) -> tuple[Tensor, Tensor]:
    """`pivoted_columns` of columns whose squares are 1."""
    batch, k, _ = A.shape
    A, matrix = A.clone(), torch.arange(batch, device=A.device)
    R, N = torch.zeros_like(A), torch.eye(k, dtype=A.dtype, device=A.device).repeat(batch, 1, 1)
    kept = torch.zeros(batch, k, dtype=torch.bool, device=A.device)
    # What is left of the columns; -1: their turn has been.
    left = A.diagonal(dim1=-2, dim2=-1).clamp(min=0)
    for _ in range(k):
        chosen = (left >= SHARE * left.amax(dim=-1, keepdim=True)).int().argmax(dim=-1)
        line = torch.where(left >= 0, A[matrix, chosen], 0.0)
        pivot = line[matrix, chosen]
        kept[matrix, chosen] = real = pivot > least
        scale = torch.where(real, pivot, torch.inf).rsqrt()[:, None]
        line, own = line * scale, N[matrix, :, chosen] * scale
        R[matrix, chosen] = line
        left[matrix, chosen], line[matrix, chosen] = -1.0, 0.0
        N -= own[:, :, None] * line[:, None, :]
        N[matrix, :, chosen] = own
        A -= line[:, :, None] * line[:, None, :]
        left = torch.where(left >= 0, A.diagonal(dim1=-2, dim2=-1).clamp(min=0), -1.0)
    return R, torch.where(kept[:, None, :], N, 0.0)


def _again(gram: Tensor, R: Tensor, N: Tensor) -> tuple[Tensor, Tensor]:
    """Return R and N of `gram` from what one time has made of it."""
    R2, N2 = independent_columns(N.mT @ gram @ N, twice=False)
    return R2 @ R, N @ N2


def tall_columns(gram: Tensor, least: float = DEPENDENT) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `pivoted_columns` does of [U S] (B, m, r) each, U nearly orthonormal or zero; U before S."""
    r = gram.shape[-1] // 2
    of_S = gram[:, r:, r:]
    R1, N1 = independent_columns(gram[:, :r, :r], twice=False)
    C = N1.mT @ gram[:, :r, r:]
    rest = torch.baddbmm(of_S, C.mT, C, alpha=-1)
    R2, N2, closest = pivoted_columns(rest, of_S.diagonal(dim1=-2, dim2=-1), least)
    zeros = torch.zeros_like(C)
    R = torch.cat([torch.cat([R1, C], dim=2), torch.cat([zeros, R2], dim=2)], dim=1)
    N = torch.cat([torch.cat([N1, -(N1 @ C) @ N2], dim=2), torch.cat([zeros, N2], dim=2)], dim=1)
    return R, N, closest


def polished(tall: Sequence[tuple[Tensor, Tensor]], weights: Tensor, closest: Tensor) -> Tensor:
    """Return weights whose [A B] weights are orthonormal, of those that make them nearly so: a step of Newton's.

    What is summed anew for it, the product's own Gram matrix, does not have the error of [A B]'[A B] in small columns.
    Elsewhere nothing is read and nothing changes.

    Args:
        tall: A and B (b, m, r), float32 or float64, of one shape after the other.
        weights: (B, 2r, r) float64, of all shapes.
        closest: (B,), from `tall_columns`.
    """
    close = closest < _CLOSE
    if close.device.type == "cpu" and not close.any():
        return weights
    excess = weights.new_zeros(len(weights), weights.shape[-1], weights.shape[-1])
    end = 0
    for A, B in tall:
        part = slice(end, end := end + len(A))
        _excess(A, B, weights[part], close[part], excess[part])
    return torch.baddbmm(weights, weights, excess, alpha=-0.5)


def _excess(A: Tensor, B: Tensor, weights: Tensor, close: Tensor, out: Tensor) -> None:
    """Put Q'Q - I of Q = [A B] weights into `out` (b, r, r) where `close` (b,)."""
    if usable(A.device) and A.dtype is torch.float32:
        from mofasgd.kernels.gram import excess as on_gpu

        on_gpu(A, B, weights, close, out)
        return
    where = close.nonzero()[:, 0] if close.device.type == "cpu" else torch.arange(len(close), device=close.device)
    Q = torch.cat([A[where], B[where]], dim=-1).double() @ weights[where]
    found = Q.mT @ Q
    found.diagonal(dim1=-2, dim2=-1).sub_(1)
    out[where] = torch.where(close[where, None, None], found, 0.0)


def tall_product(A: Tensor, B: Tensor) -> Tensor:
    """Return A'B of (B, m, k) and (B, m, l), of tall ones as a sum over strips of rows.

    A GPU's product of few matrices would sum all rows of one in a single multiprocessor.
    """
    batch, m, _ = A.shape
    strips = math.gcd(m, 16)
    if m <= 2 * _WIDEST or strips == 1:
        return A.mT @ B
    A, B = (t.reshape(batch * strips, m // strips, t.shape[-1]) for t in (A, B))
    parts = A.mT @ B
    return parts.view(batch, strips, *parts.shape[1:]).sum(dim=1)


def orthonormal(A: Tensor, *, twice: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Return Q, N, R with A N = Q (B, k, r), A = Q R; columns of Q are orthonormal or zero. Float64.

    `twice`: as in `independent_columns`.
    """
    R, N = independent_columns(tall_product(A, A), twice=twice)
    return A @ N, N, R


def completed(Q: Tensor, rows: int) -> Tensor:
    """Return Q (B, k, r) with its zero columns replaced by orthonormal ones in the first `rows` >= r coordinates.

    The others, orthonormal to some 1e-5 or better, come back orthonormal to the last bit. Float64.
    """
    make = _kept_filling if Q.shape[-2] <= 2 * _WIDEST else _filling
    fill = make(Q.shape[-2], rows, Q.shape[-1], Q.device).expand_as(Q)
    fill = torch.baddbmm(fill, Q, tall_product(Q, fill), alpha=-1)
    missing = torch.linalg.vector_norm(Q, dim=-2, keepdim=True) < 0.5
    return orthonormal(torch.where(missing, fill, Q), twice=False)[0]


def _filling(height: int, rows: int, columns: int, device: torch.device) -> Tensor:
    """Return a matrix (height, columns) without structure in its first `rows`, and zeros below. Float64."""
    # Any fixed one will do.
    found: Tensor = torch.nn.functional.pad(gaussian(rows, columns, 0, device, torch.float64), (0, 0, 0, height - rows))
    return found


_kept_filling = functools.lru_cache(maxsize=64)(_filling)
"""For small matrices, which take many launches to make."""


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
    Y = _kept_filling(core.shape[-1], core.shape[-1], rank, core.device)
    # The power grows by a factor of two at most from one product to the next: otherwise what rounding leaves of the
    # large directions would swamp the small ones.
    for power in (core, core.mT, H, *[fourth] * _ITERATIONS):
        Y = orthonormal(power @ Y, twice=False)[0]
    return Y


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
    R, N = _again(grams, *tall_columns(grams)[:2])
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
    _, N = _again(YY, *pivoted_columns(YY, YY.diagonal(dim1=-2, dim2=-1))[:2])
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
