"""The normalized complement: the part of the gradient that the low-rank update cannot see, row by row.

Beyond the paper. The update of the factors works in the spaces of [U GV] and [V G'U]; what G holds outside both,

    R = (I - Q Q') G (I - P P'),        Q = orth([U GV]),  P = orth([V G'U]),

is lost to the momentum. Each row of it is scaled to the same length and added to the step, with no state at all:

    D = U_new V_new' + c sqrt(min(m, n)) E,        E_i = R_i / (|R_i| sqrt(m))

U and V are the factors before this step's update; in a matrix's first window, which has none before, those of M_1.
Rows of W are outputs here; of a transposed weight (`transposed` in its group) the columns are scaled.
`docs/complement.md` has the measurements behind these choices: of U and V alone the complement trains worse.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mofasgd.momentum import power_of_two
from mofasgd.precision import in_true_float32

NOISE = 1e-3
"""A row with |R_i| <= NOISE |G_i| is what rounding leaves of a row inside both spaces, not a direction."""

EPSILONS = 100
"""Products with G round by this many machine epsilons of |G| at most."""


def _new_directions(basis: Tensor, image: Tensor, noise: Tensor) -> Tensor:
    """Return an orthonormal basis of what `image` (..., m, r) adds to `basis` (..., m, r); zero columns where nothing.

    A plain QR would complete directions below `noise` (..., 1, 1) at random, and the complement would lose them.
    """
    # Projecting twice keeps the result orthogonal to the basis even where little is left.
    for _ in range(2):
        image = image - basis @ (basis.mT @ image)
    Q, T = torch.linalg.qr(image)
    X, t, _ = torch.linalg.svd(T)
    found: Tensor = Q @ torch.where(t[..., None, :] > noise, X, 0.0)
    return found


@in_true_float32
def seen_spaces(U: Tensor, V: Tensor, GV: Tensor, GtU: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """Return bases Q (..., m, 2r) of [U GV] and P (..., n, 2r) of [V G'U]; columns are orthonormal or zero.

    Args:
        U, V: real columns of the factors (`momentum.real_factors`), shapes (..., m, r), (..., n, r).
        GV, GtU: the gradient's sketches by them.
        size: |G|_F in float64, shape (...); the sketches round relative to it.
    """
    scale = power_of_two(GV, GtU)
    noise = (EPSILONS * torch.finfo(U.dtype).eps * size[..., None, None] / scale).to(U.dtype)
    Q = torch.cat([U, _new_directions(U, GV / scale, noise)], dim=-1)
    P = torch.cat([V, _new_directions(V, GtU / scale, noise)], dim=-1)
    return Q, P


@in_true_float32
def normalized_complement(Q: Tensor, P: Tensor, G: Tensor) -> Tensor:
    """Return E (..., m, n) in the dtype of Q; |E|_F <= 1, with equality when no row is left out.

    Args:
        Q, P: from `seen_spaces`.
        G: gradient (..., m, n), finite.
    """
    m = G.shape[-2]
    G = G.to(Q.dtype)
    G = G / power_of_two(G)
    # R = (I - Q Q') G (I - P P'), without projectors of size m x m or n x n
    R = G - Q @ (Q.mT @ G)
    R = R - (R @ P) @ P.mT
    # E_i = R_i / (|R_i| sqrt(m)), with lengths taken of rows of largest element 1, whose squares stay in range
    unit = G.abs().amax(dim=-1, keepdim=True)
    unit = torch.where(unit > 0, unit, 1.0)
    R = R / unit
    length = torch.linalg.vector_norm(R, dim=-1, keepdim=True)
    noise = NOISE * torch.linalg.vector_norm(G / unit, dim=-1, keepdim=True)
    # The projections also round relative to the whole of G, which is all there is in the row of a dead unit.
    floor = EPSILONS * torch.finfo(G.dtype).eps * torch.linalg.matrix_norm(G)[..., None, None] / math.sqrt(m)
    return torch.where((length > noise) & (length * unit > floor), R / (length * math.sqrt(m)), 0.0)


def complement_scale(c: float, m: int, n: int) -> float:
    """Return c sqrt(min(m, n)), the Frobenius norm of the complement's part of the step."""
    return c * math.sqrt(min(m, n))
