"""The normalized complement of a list of same-shaped gradients on CUDA; no matrix of their size is made.

Equals `mofasgd.complement.normalized_complement`, and with `kernels.complement` `apply.apply_update`. In three calls:

    residual_factors   R = G - [Q H] [T P]',  T = G'Q,  H = G P - Q T'P      two reads of G, by `kernels.project`,
                                                                            for the half of Q and P that is new
    row_scales         a_i = 1 / (|R_i| sqrt(m)), or 0 for what is no direction       one read of G
    kernels.complement.apply_complement    W <- keep W - (L V' + diag(scales) R)      one read of G, W in place

All of it is in units of a power of two at |G|_F, which bounds T and, but for a factor below 2, H.

Between the last two the caller makes `scales` of a and the rate, for which `lr_scale` may need
`complement_square_norm`.

What is left of a row may be a thousandth of it, so the rounding of what is taken away counts:

* bfloat16 sketches are products with Q and P *rounded*. Taken as G P and G'Q they leave up to 2e-3 of the seen part
  behind (4e-4 if it is spread over 512 columns). T and H are therefore those of the oblique projectors
  I - Q (Qr'Q)^-1 Qr' and I - Pr (P'Pr)^-1 P', Qr and Pr the rounded bases: they need the same sketches and take all of
  the seen part away. What they change is 5e-4 of what is left.
* The factors of a bfloat16 gradient are float16, with powers of two that keep them in its range: 11 bits leave 3e-4
  (root mean square) of what is taken away, NOISE being 1e-3. A row or column that still is a direction, 1e-5 of an
  average one, has factors of 1e-8 |G|_F: 2^-13 in their scale, where float16 is still normal. TF32, which truncates,
  leaves 8e-4 at twice the cost, and bfloat16 2.4e-3. Factors of a float32 gradient stay float32, multiplied as three
  TF32 products.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mofasgd.complement import EPSILONS, NOISE
from mofasgd.precision import in_true_float32

_HALF = 2.0**14
"""Scale of float16 factors, whose elements are 2 at most: they stay below 65504."""


class Residual(NamedTuple):
    """R of every matrix (B of them, m x n): R * inverse = G * inverse - scale * left right'.

    Attributes:
        left: [Q H], (B, m, 4r), float16 or float32, contiguous.
        right: [T P], (B, n, 4r).
        inverse: (B,) float32, powers of two that bring |G|_F to 1/2 ... 1; 0 for a matrix that is not finite, whose
            factors are zeros.
        scale: a power of two that keeps float16 factors in its range; 1 in float32.
        left_squares, right_squares: of the columns' lengths, (B, 4r) float32.
        size: |G|_F * inverse, (B,) float32.
    """

    left: Tensor
    right: Tensor
    inverse: Tensor
    scale: float
    left_squares: Tensor
    right_squares: Tensor
    size: Tensor


@in_true_float32
def _weights(of_Q: Tensor, of_P: Tensor, size: Tensor, bound: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return what makes H of [G P, Q] (B, 2k, k) and T of G'Q (B, k, k), both times `bound`, and `Residual.inverse`.

    Args:
        of_Q: Q'Qr (B, k, k) float32, Qr being Q rounded to the dtype of the gradient.
        of_P: P'Pr and (G'Q)'Pr, (B, 2, k, k).
        size: |G|_F (B,) float64.
    """
    # The number whose bits hold this exponent: exact, which a power function need not be.
    inverse = ((127 - torch.frexp(size).exponent.clamp(-100, 125)) << 23).view(torch.float32)
    # (Q'Qr)^-1 = 2 I - Q'Qr up to the square of a rounding; where a column of Q is zero, so is what it multiplies.
    to_T, oblique = -of_Q, -of_P[:, 0]
    for square in (to_T, oblique):
        square.diagonal(dim1=-2, dim2=-1).add_(2)
    scale = (bound * inverse)[:, None, None]
    to_T *= scale
    to_H = torch.cat([oblique * scale, -(to_T.mT @ of_P[:, 1]) @ oblique], dim=1)
    # Whatever is not finite shows in one of these sums.
    finite = (to_H.sum(dim=(1, 2)) - size).isfinite()
    return to_H, to_T, torch.where(finite, inverse, 0.0)


def residual_factors(
    gradients: Sequence[Tensor | None],
    Q: Tensor,
    P: Tensor,
    size: Tensor | None = None,
    known: tuple[Tensor, Tensor] | None = None,
) -> Residual:
    """Return what `row_scales` and `kernels.complement.apply_complement` need beside the gradients.

    Args:
        gradients: contiguous, of one shape and dtype (float32 or bfloat16), b matrices (m, n) each; None counts as
            zeros.
        Q, P: from `complement.seen_spaces`, (B, m, 2r) and (B, n, 2r), float32, contiguous; B = len(gradients) * b.
        size: |G|_F (B,) float64, if it is known; else one more read of G.
        known: sketches of these gradients by the first r columns of P and Q, as `kernels.project` makes them,
            (B, m, r) and (B, n, r), float32, contiguous; None: two more reads of G. Where such a column is zero, the
            sketch may be that by the completion in its place: what it makes is multiplied by zeros.
    """
    from mofasgd.kernels.factors import cross, join
    from mofasgd.kernels.norm import norms_of
    from mofasgd.kernels.project import sketch_list

    dtype = next(g for g in gradients if g is not None).dtype
    (U, Qnew), (V, Pnew) = Q.chunk(2, dim=-1), P.chunk(2, dim=-1)
    GV, GtU = sketch_list(gradients, U, V) if known is None else known
    GPnew, GtQnew = sketch_list(gradients, Qnew, Pnew)
    GP, GtQ = (GV, GPnew), (GtU, GtQnew)
    size = norms_of(gradients, len(Q)) if size is None else size
    low, bound = (torch.float32, 1.0) if dtype is torch.float32 else (torch.float16, _HALF)
    to_H, to_T, inverse = _weights(cross(Q, None, dtype)[:, 0], cross(P, GtQ, dtype), size, bound)
    left, left_squares = join(Q, GP, to_H, inverse, bound, low, left=True)
    right, right_squares = join(P, GtQ, to_T, inverse, bound, low, left=False)
    return Residual(left, right, inverse, bound**-2, left_squares, right_squares, (size * inverse).float())


def row_scales(gradients: Sequence[Tensor | None], residual: Residual, *, transposed: bool = False) -> Tensor:
    """Return a_i = 1 / (|R_i| sqrt(m)), (B, m) float32, in the residual's unit; 0 for a row that is no direction.

    Args:
        gradients: as in `residual_factors`.
        residual: its result.
        transposed: columns take the place of rows; the result is (B, n).

    A row is no direction where `complement.normalized_complement` says so. Of a bfloat16 gradient it is none either
    where |R_i| is below NOISE of the terms that were taken away: they may be large and cancel where G_i is zero, as in
    an embedding the row of a token that occurs no more. A matrix that is not finite has zeros.
    """
    from mofasgd.kernels.complement import row_squares, scales_of

    squares, terms = row_squares(gradients, residual, transposed=transposed)
    rows = squares.shape[-1]
    floor = residual.size * (EPSILONS * torch.finfo(torch.float32).eps / math.sqrt(rows))
    return scales_of(squares, terms if residual.left.dtype is torch.float16 else None, floor, NOISE)


def complement_square_norm(scales: Tensor) -> Tensor:
    """Return |E|_F^2, (B,), from `row_scales`: the share of rows that are a direction."""
    return (scales != 0).to(scales.dtype).mean(dim=-1)
