"""How the factors of a batch of matrices follow from the sketches of their gradients.

"svd" is the exact reference (`momentum.update_factors`), "gram" the same update by Gram matrices (`mofasgd.algebra`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from mofasgd.algebra import Small, Weights, combine, gram, seen, solve
from mofasgd.complement import seen_spaces
from mofasgd.kernels import usable
from mofasgd.momentum import Factors, real_columns, real_factors, tangent_square_norm, update_factors

SOLVERS = ("auto", "svd", "gram")


class Problem(Protocol):
    """B matrices of one shape with a momentum, and the sketches of their gradients.

    Attributes:
        finite, nonzero: bool (B,), whether the sketches are; those by completion columns do not count.
        square_norms: (B,) float64, |Ghat|^2.
        before: the stored factors with zeros in place of completion columns.
    """

    finite: Tensor
    nonzero: Tensor
    square_norms: Tensor

    @property
    def before(self) -> Factors:
        """Real columns of the stored factors."""

    def spaces(self, gradients: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return what the complement leaves out (`complement.seen_spaces`); `gradients` (b, m, n) are finite."""


class ExactProblem:
    """QR of the tall matrices and LAPACK's SVD of the core, in the dtype of the state."""

    def __init__(self, stored: Factors, GV: Tensor, GtU: Tensor) -> None:
        self.before = real_factors(*stored)
        kept = real_columns(stored.s)[:, None, :]
        GV, GtU = torch.where(kept, GV, 0.0), torch.where(kept, GtU, 0.0)
        self.finite = GV.isfinite().all(-1).all(-1) & GtU.isfinite().all(-1).all(-1)
        # LAPACK refuses NaN.
        mask = self.finite[:, None, None]
        self.GV, self.GtU = torch.where(mask, GV, 0.0), torch.where(mask, GtU, 0.0)
        self.nonzero = (self.GV != 0).any(-1).any(-1) | (self.GtU != 0).any(-1).any(-1)
        self.square_norms = tangent_square_norm(self.before.U, self.GV, self.GtU)

    def spaces(self, gradients: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """See `Problem`."""
        return seen_spaces(self.before.U, self.before.V, self.GV, self.GtU, _sizes(gradients))

    def solve(self, beta: float | Tensor, factor: Tensor | None, active: Tensor) -> Factors:
        """Return the factors after the step where `active` (B,); anything elsewhere."""
        mask = active[:, None, None]
        GV, GtU = torch.where(mask, self.GV, 0.0), torch.where(mask, self.GtU, 0.0)
        if factor is not None:
            GV, GtU = GV * factor, GtU * factor
        return update_factors(*self.before, GV, GtU, beta)


class GramProblem:
    """Gram matrices of the tall matrices, and small algebra that all problems of equal rank share."""

    def __init__(self, stored: Factors, GV: Tensor, GtU: Tensor) -> None:
        self.stored, self.GV, self.GtU = stored, GV, GtU
        left, right = gram(stored.U, GV), gram(stored.V, GtU)
        # Sums of squares in float64 are finite exactly if their float32 terms are.
        self.finite = left.isfinite().all(-1).all(-1) & right.isfinite().all(-1).all(-1)
        mask = self.finite[:, None, None]
        self.small = Small(torch.where(mask, left, 0.0), torch.where(mask, right, 0.0), stored.s)
        r = stored.s.shape[-1]
        kept = real_columns(stored.s).double()
        squares = sum(
            (g.diagonal(dim1=-2, dim2=-1)[:, r:] * kept).sum(dim=-1) for g in (self.small.left, self.small.right)
        )
        assert isinstance(squares, Tensor)
        self.nonzero = squares > 0
        C = self.small.left[:, :r, r:] * kept[:, :, None] * kept[:, None, :]
        self.square_norms = (squares - C.square().sum(dim=(-2, -1))).clamp(min=0)

    @property
    def before(self) -> Factors:
        """See `Problem`."""
        return real_factors(*self.stored)

    def spaces(self, gradients: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """See `Problem`."""
        left, right = seen(self.small, _sizes(gradients))
        U, _, V = self.before
        every = torch.ones_like(self.finite)
        Q = torch.cat([U, combine(self.stored.U, self.GV, left, every)], dim=-1)
        return Q, torch.cat([V, combine(self.stored.V, self.GtU, right, every)], dim=-1)

    def apply(self, weights: Weights, active: Tensor) -> Factors:
        """Return the factors after the step where `active` (B,); anything elsewhere."""
        U, s, V = self.stored
        return Factors(
            combine(U, self.GV, weights.left, active),
            weights.s.to(s.dtype),
            combine(V, self.GtU, weights.right, active),
        )


def _sizes(gradients: Sequence[Tensor]) -> Tensor:
    """Return |G|_F of each matrix in float64."""
    return torch.cat([torch.linalg.vector_norm(G, dim=(-2, -1), dtype=torch.float64) for G in gradients])


def problem(solver: str, stored: Factors, GV: Tensor, GtU: Tensor) -> ExactProblem | GramProblem:
    """Return the problem of one batch; `solver` is a name of `SOLVERS`."""
    fast = usable(stored.U.device) and stored.U.dtype is torch.float32
    if solver == "gram" or (solver == "auto" and fast):
        return GramProblem(stored, GV, GtU)
    return ExactProblem(stored, GV, GtU)


Batch = tuple["ExactProblem | GramProblem", "float | Tensor", Tensor]
"""A problem, beta, and which of its matrices move (B,)."""


def solve_all(batches: Sequence[Batch], factor: Tensor | None) -> Iterator[Factors]:
    """Yield the factors of every batch after the step, in order; `factor` (0-dim) scales the gradients.

    The small algebra of all shapes of equal rank and beta is one batch; the tall results are made one by one.
    """
    groups: dict[tuple[object, ...], list[int]] = {}
    for i, (batch, beta, _) in enumerate(batches):
        if isinstance(batch, GramProblem):
            key = (batch.small.s.shape[-1], batch.small.s.device, id(beta) if isinstance(beta, Tensor) else beta)
            groups.setdefault(key, []).append(i)
    found: dict[int, Weights] = {}
    for members in groups.values():
        smalls = [batch.small for batch, _, _ in (batches[i] for i in members) if isinstance(batch, GramProblem)]
        joined = Small(*(torch.cat(parts) for parts in zip(*smalls, strict=True)))
        counts = [len(small.s) for small in smalls]
        solved = solve(joined, batches[members[0]][1], factor)
        parts = [part.split_with_sizes(counts) for part in solved]
        found |= {i: Weights(*part) for i, part in zip(members, zip(*parts, strict=True), strict=True)}
    for i, (batch, beta, active) in enumerate(batches):
        if isinstance(batch, GramProblem):
            yield batch.apply(found.pop(i), active)
        else:
            yield batch.solve(beta, factor, active)
