"""The normalized complement of a list of same-shaped gradients on CUDA; no matrix of their size is made.

Equals `mofasgd.complement.normalized_complement`, and with `kernels.complement` `apply.apply_update`. In three calls:

    residual_factors   R = G - [Q H] [T P]',  T = G'Q,  H = G P - Q T'P      two reads of G, by `kernels.project`
    row_scales         a_i = 1 / (|R_i| sqrt(m)), or 0 for what is no direction       one read of G
    kernels.complement.apply_complement    W <- keep W - (L V' + diag(scales) R)      one read of G, W in place

Between the last two the caller makes `scales` of a and his rate, for which `lr_scale` may need `square_norm`.

What is left of a row may be a thousandth of it, so the rounding of what is taken away counts:

* bfloat16 sketches are products with Q and P *rounded*. Taken as G P and G'Q they leave up to 2e-3 of the seen part
  behind (4e-4 if it is spread over 512 columns). T and H are therefore those of the oblique projectors
  I - Q (Qr'Q)^-1 Qr' and I - Pr (P'Pr)^-1 P', Qr and Pr the rounded bases: they need the same sketches and take all of
  the seen part away. What they change is 5e-4 of what is left.
* The factors of a bfloat16 gradient are float16, with powers of two that keep them in its range: 11 bits leave 3e-4
  (root mean square) of what is taken away, NOISE being 1e-3. TF32, which truncates, leaves 8e-4 at twice the cost, and
  bfloat16 2.4e-3. Factors of a float32 gradient stay float32, multiplied as three TF32 products.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mofasgd.complement import EPSILONS, NOISE
from mofasgd.momentum import power_of_two
from mofasgd.precision import in_true_float32

_HALF = 2.0**14
"""Scale of float16 factors: elements in the largest's binade stay below 65504, those 2^-28 of it are still normal."""


class Residual(NamedTuple):
    """R of every matrix (B of them, m x n): R * inverse = G * inverse - scale * left right'.

    Attributes:
        left: [Q H], (B, m, 4r), float16 or float32, contiguous.
        right: [T P], (B, n, 4r).
        inverse: (B,) float32, powers of two that bring T and H to size 1.
        scale: a power of two that keeps float16 factors in its range; 1 in float32.
    """

    left: Tensor
    right: Tensor
    inverse: Tensor
    scale: float


@in_true_float32
def _factors(Q: Tensor, P: Tensor, GP: Tensor, GtQ: Tensor, dtype: torch.dtype) -> Residual:
    """Return the residual of gradients of `dtype`, whose sketches GP and GtQ are by Q and P rounded to it."""
    Qr, Pr = Q.to(dtype).to(Q.dtype), P.to(dtype).to(P.dtype)
    two = 2 * torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
    size = power_of_two(GP, GtQ)
    # (Q'Qr)^-1 = 2 I - Q'Qr up to the square of a rounding; where a column of Q is zero, so is what it multiplies.
    # Scales go into these small matrices, or each would be a pass over tall ones.
    T = GtQ @ ((two - Q.mT @ Qr) / size)
    oblique = two - P.mT @ Pr
    H = torch.baddbmm(GP @ (oblique / size), Q, (T.mT @ Pr) @ oblique, alpha=-1)
    # Sums may be larger than the sketches, and float16 has no room for that.
    unit = (size * power_of_two(T, H)).clamp(min=2.0**-125)
    low = torch.float32 if dtype is torch.float32 else torch.float16
    bound = 1.0 if dtype is torch.float32 else _HALF
    left, right = (_joined(Q, H, low, bound, bound * size / unit), _joined(T, P, low, bound * size / unit, bound))
    return Residual(left, right, 1 / unit[:, 0, 0], bound**-2)


def _joined(A: Tensor, B: Tensor, dtype: torch.dtype, of_A: Tensor | float, of_B: Tensor | float) -> Tensor:
    """Return [of_A A, of_B B] in `dtype`, written once."""
    k = A.shape[-1]
    result = torch.empty(*A.shape[:-1], 2 * k, dtype=dtype, device=A.device)
    for part, factor, out in ((A, of_A, result[..., :k]), (B, of_B, result[..., k:])):
        torch.mul(part, factor, out=out)
    return result


def residual_factors(gradients: Sequence[Tensor | None], Q: Tensor, P: Tensor) -> Residual:
    """Return what `row_scales` and `kernels.complement.apply_complement` need beside the gradients.

    Args:
        gradients: contiguous, of one shape and dtype (float32 or bfloat16), b matrices (m, n) each; None counts as
            zeros.
        Q, P: from `complement.seen_spaces`, (B, m, 2r) and (B, n, 2r), float32, contiguous; B = len(gradients) * b.
    """
    from mofasgd.kernels.project import sketch_list

    dtype = next(g for g in gradients if g is not None).dtype
    return _factors(Q, P, *sketch_list(gradients, Q, P), dtype)


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
    from mofasgd.kernels.complement import row_squares

    of_R, of_G = row_squares(gradients, *residual, transposed=transposed)
    length, least = of_R.sqrt(), NOISE * of_G.sqrt()
    left, right = (residual.right, residual.left) if transposed else (residual.left, residual.right)
    if left.dtype is torch.float16:
        # Row i of A B' rounds by about that share of sqrt(sum_k A_ik^2 |B_k|^2).
        of_B = torch.linalg.vector_norm(right, dim=-2, keepdim=True, dtype=torch.float32)
        least = torch.maximum(least, NOISE * residual.scale * torch.linalg.vector_norm(left * of_B, dim=-1))
    floor = EPSILONS * torch.finfo(torch.float32).eps * of_G.mean(dim=-1, keepdim=True).sqrt()
    # An infinite length compares as no larger than its bound.
    return torch.where((length > least) & (length > floor), 1 / (length * math.sqrt(left.shape[-2])), 0.0)


def square_norm(scales: Tensor) -> Tensor:
    """Return |E|_F^2, (B,), from `row_scales`: the share of rows that are a direction."""
    return (scales != 0).to(scales.dtype).mean(dim=-1)
