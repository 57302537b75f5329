"""MoFaSGD's mathematics: the paper's momentum factorization, batched, in plain torch.

Source: "Low-rank Momentum Factorization for Memory Efficient Training" (TMLR 2025, arXiv 2507.08091). This file is
the reference: every faster path in this package is tested against it.

==========  ====================  ==========================================================================
paper       argument              meaning (every shape may have the same leading batch dimensions)
==========  ====================  ==========================================================================
G           ``G``     (m, n)      gradient of the weight
M           ``U, s, V``           first moment, M = U diag(s) V'; U (m, r) and V (n, r) orthonormal, s (r,) falling
G V         ``GV``    (m, r)      right sketch of the gradient
G' U        ``GtU``   (n, r)      left sketch of the gradient
beta        ``beta``              momentum decay
Ghat        (never formed)        G projected on the tangent space of the rank-r matrices at M
==========  ====================  ==========================================================================

Deviations from the paper and the authors' code:

* [U, GV - U C] is orthonormalized, not [U, GV] (C = U'GV). Both span the same space; this way the core matrix holds
  beta diag(s) + C itself, where theirs has to cancel two copies of C in rounding.
* Sketches are divided by a power of two before any factorization and the result is multiplied back. That is exact,
  and it makes gradients of size 1e-30 and 1e30 as good as any other.
* The moment starts from the first gradient (`init_sketch`, `init_factors`); the authors' code starts from the weight.
* Columns of U and V beyond the numerical rank of M are an arbitrary orthonormal completion. `direction` leaves them
  out of the step and `real_factors` out of the tangent space, so that rounding noise decides nothing and a gradient of
  rank q < r moves the weight in a q-dimensional space only.

All functions are pure, take float32 or float64, and compute in that precision whatever autocast and TF32 say.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mofasgd.precision import in_true_float32

RANK_TOLERANCE = 1e-5
"""Singular values at or below this fraction of the largest one are rounding noise in float32."""


class Factors(NamedTuple):
    """Truncated singular value decomposition U diag(s) V' with s (..., r) non-negative and falling."""

    U: Tensor
    s: Tensor
    V: Tensor


def power_of_two(*tensors: Tensor) -> Tensor:
    """Largest power of two <= the largest magnitude, one for each matrix, shape (..., 1, 1); 1 where all are 0."""
    largest = torch.stack([torch.linalg.vector_norm(t, torch.inf, dim=(-2, -1)) for t in tensors]).amax(dim=0)
    # x / (2 mantissa) is a power of two without rounding. Below 2^-125 it might be subnormal, and useless to divide by.
    scale = (largest / (2 * torch.frexp(largest).mantissa)).clamp(min=2.0**-125)
    return torch.where(largest > 0, scale, 1.0)[..., None, None]


def _svd(A: Tensor, rank: int) -> Factors:
    # In float32, CUDA's own is orthonormal to some 1e-5 only.
    U, s, Vh = torch.linalg.svd(A.double() if A.is_cuda else A, full_matrices=False)
    return Factors(*(t.to(A.dtype) for t in (U[..., :rank], s[..., :rank], Vh[..., :rank, :].mT)))


@in_true_float32
def truncated_svd(A: Tensor, rank: int) -> Factors:
    """Return the best rank-`rank` approximation of A (..., m, n) as factors; rank <= min(m, n)."""
    scale = power_of_two(A)
    U, s, V = _svd(A / scale, rank)
    return Factors(U, s * scale[..., 0], V)


@in_true_float32
def sketch(G: Tensor, U: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """Return (G V, G' U), all that the update reads of G, in the dtype of U. Both are linear in G."""
    G = G.to(U.dtype)
    return G @ V, G.mT @ U


@in_true_float32
def update_factors(U: Tensor, s: Tensor, V: Tensor, GV: Tensor, GtU: Tensor, beta: float | Tensor) -> Factors:
    """Return the factors of SVD_r(beta M + Ghat), the paper's update of the momentum factors (UMF).

    Args:
        U, s, V: factors of M, shapes (..., m, r), (..., r), (..., n, r); U and V with orthonormal columns.
        GV, GtU: the two sketches of the gradient, shapes (..., m, r), (..., n, r).
        beta: momentum decay, a number or a tensor that broadcasts against s.

    The result is exact for every shape, 2r > min(m, n) included. Inputs must be finite.
    """
    r = s.shape[-1]
    scale = power_of_two(s[..., None], GV, GtU)
    s, GV, GtU = s / scale[..., 0], GV / scale, GtU / scale
    if isinstance(beta, Tensor):
        beta = beta.to(s.dtype)
    # C = U' G V
    C = U.mT @ GV
    # [U  GV - U C] = Qu Ru,   [V  GtU - V C'] = Qv Rv
    Qu, Ru = torch.linalg.qr(torch.cat([U, GV - U @ C], dim=-1))
    Qv, Rv = torch.linalg.qr(torch.cat([V, GtU - V @ C.mT], dim=-1))
    # beta M + Ghat = [U  GV - U C] [[beta diag(s) + C, I], [I, 0]] [V  GtU - V C']'
    eye = torch.eye(r, dtype=s.dtype, device=s.device).expand_as(C)
    K = torch.cat(
        [
            torch.cat([torch.diag_embed(beta * s) + C, eye], dim=-1),
            torch.cat([eye, torch.zeros_like(C)], dim=-1),
        ],
        dim=-2,
    )
    # SVD_r of the 2r x 2r core; Qu and Qv carry it to m x n
    A, s, B = _svd(Ru @ K @ Rv.mT, r)
    return Factors(Qu @ A, s * scale[..., 0], Qv @ B)


@in_true_float32
def tangent_square_norm(U: Tensor, GV: Tensor, GtU: Tensor) -> Tensor:
    """Return |Ghat|_F^2 = |GV|^2 + |GtU|^2 - |U'GV|^2 in float64, shape (...)."""

    scale = power_of_two(GV, GtU)
    GV, GtU = GV / scale, GtU / scale

    def square(A: Tensor) -> Tensor:
        norm: Tensor = torch.linalg.vector_norm(A, dim=(-2, -1), dtype=torch.float64)
        return norm.square()

    # Ghat = U GtU' + (GV - U C) V', two orthogonal terms: written so, nothing cancels.
    total = square(GtU) + square(GV - U @ (U.mT @ GV))
    return total * scale[..., 0, 0].double().square()


def init_widths(rank: int) -> tuple[int, int]:
    """Return (l, k), the widths of the first window's test matrices: l = 2 rank + 8 and k = 2 l + 1."""
    width = 2 * rank + 8
    return width, 2 * width + 1


def starts_from_gradient(m: int, n: int, rank: int) -> bool:
    """Return whether the first window of an m x n matrix sums G itself, its sketches being no smaller than G."""
    left, right = init_widths(rank)
    return m * left + n * right >= m * n or right > m or left > n


@in_true_float32
def init_sketch(G: Tensor, Omega: Tensor, Psi: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first window's sketches Y = G Omega (..., m, l) and Z = G' Psi (..., n, k). Both are linear in G.

    Args:
        G: gradient (..., m, n).
        Omega: Gaussian test matrix (n, l).
        Psi: Gaussian test matrix (m, k), k > l.
    """
    return sketch(G, Psi, Omega)


@in_true_float32
def init_factors(Y: Tensor, Z: Tensor, Psi: Tensor, rank: int) -> Factors:
    """Return the factors of M_1 from the first window's sketches (single-pass randomized SVD).

    M_1 equals SVD_r(G) up to rounding when rank(G) <= r. Shapes as in `init_sketch`; rank <= l.
    """
    scale = power_of_two(Y, Z)
    Y, Z = Y / scale, Z / scale
    # Q = orth(Y);  G ~ Q X  with  X = (Psi' Q)^+ Z'
    Q, _ = torch.linalg.qr(Y)
    P, T = torch.linalg.qr(Psi.mT @ Q)
    X = torch.linalg.solve_triangular(T, P.mT @ Z.mT, upper=True)
    # (U, s, V) = SVD_r(Q X), through the small S of X' = P S
    P, S = torch.linalg.qr(X.mT)
    A, s, B = _svd(S.mT, rank)
    return Factors(Q @ A, s * scale[..., 0], P @ B)


def moving(s: Tensor, tol: float = RANK_TOLERANCE) -> Tensor:
    """Return which directions are real, s_i > tol s_1, as booleans of the shape of s (..., r)."""
    return s > tol * s[..., :1]


def real_columns(s: Tensor, tol: float = RANK_TOLERANCE) -> Tensor:
    """Return which columns of U and V are directions of M and no completion, as booleans of the shape of s (..., r).

    A momentum of exactly 0 has no real direction; it keeps its columns, or no gradient could ever reach it again.
    """
    return moving(s, tol) | (s[..., :1] == 0)


def real_factors(U: Tensor, s: Tensor, V: Tensor, tol: float = RANK_TOLERANCE) -> Factors:
    """Return the factors with zeros in place of completion columns; the sketches by them see real directions only."""
    kept = real_columns(s, tol).to(s.dtype)
    return Factors(U * kept[..., None, :], s * kept, V * kept[..., None, :])


@in_true_float32
def direction(U: Tensor, s: Tensor, V: Tensor, tol: float = RANK_TOLERANCE) -> Tensor:
    """Return the paper's step U diag(s > tol s_1) V', shape (..., m, n): spectral norm 1, or 0 where s = 0."""
    return (U * moving(s, tol).to(U.dtype)[..., None, :]) @ V.mT
