"""The normalized complement: the part of the gradient that the low-rank momentum cannot see, row by row.

Beyond the paper. The tangent space at M loses R = (I - U U') G (I - V V'). Each row of R is scaled to the same length
and added to the step, with no state at all:

    D = U_new V_new' + c sqrt(min(m, n)) E,        E_i = R_i / (|R_i| sqrt(m))

U and V are the factors before this step's update; in a matrix's first window, which has none before, those of M_1.
`docs/complement.md` has the measurements behind these choices.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mofasgd.precision import in_true_float32

NOISE = 1e-3
"""A row with |R_i| <= NOISE |G_i| is rounding noise of the projection, not a direction; it is left out."""


@in_true_float32
def normalized_complement(U: Tensor, V: Tensor, GV: Tensor, GtU: Tensor, G: Tensor) -> Tensor:
    """Return E (..., m, n) in the dtype of U; |E|_F <= 1, with equality when no row is left out.

    Args:
        U, V: orthonormal factors (..., m, r), (..., n, r).
        GV, GtU: the gradient's sketches by them (`momentum.sketch`).
        G: gradient (..., m, n).
    """
    m = G.shape[-2]
    G = G.to(U.dtype)
    # Row lengths are taken of rows scaled to largest element 1: squares of 1e-30 or 1e30 leave float32's range.
    largest = G.abs().amax(dim=-1, keepdim=True)
    unit = torch.where(largest > 0, largest, 1.0)
    # R = G - U (G'U)' - (G V - U U'G V) V', without projectors of size m x m or n x n
    R = G - U @ GtU.mT
    R -= (GV - U @ (U.mT @ GV)) @ V.mT
    R /= unit
    length = torch.linalg.vector_norm(R, dim=-1, keepdim=True)
    noise = NOISE * torch.linalg.vector_norm(G / unit, dim=-1, keepdim=True)
    return torch.where(length > noise, R / (length * math.sqrt(m)), 0.0)


def complement_scale(c: float, m: int, n: int) -> float:
    """Return c sqrt(min(m, n)), the Frobenius norm of the complement's part of the step."""
    return c * math.sqrt(min(m, n))
